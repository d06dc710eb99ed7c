"""`visualrwkv report`: one HTML page, readable without a network, that compares runs.

For each benchmark: the scores with their intervals, the published numbers, and the questions that the runs answer
differently, with their pictures.
"""

import base64
import io
import sys
from collections import Counter
from contextlib import suppress
from datetime import date
from html import escape
from pathlib import Path

from visualrwkv.errors import InputError
from visualrwkv.eval import benchmark
from visualrwkv.eval.commands import RUN_FILE, read_run, score_files
from visualrwkv.eval.common import LETTERS, write_text
from visualrwkv.eval.predictions import join
from visualrwkv.eval.published import SPLITS, published

SHOWN = 40  # differing questions a benchmark; their pictures are what makes the page large
THUMBNAIL = 240  # pixels of the longer side
_FULL = {"mme": 2000}  # the highest score where it is not 100
_SETTINGS = ("model", "prompt", "dtype", "quantize", "max_new_tokens", "sqa_suffix", "ocr", "blank_image")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --page: #fff; --bar: #3b6fd4;
  --good: #1f7a43; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #343c48; --page: #14181e;
  --bar: #7ea6f4; --good: #6fcf97; --bad: #f08a82; } }
* { box-sizing: border-box } body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { margin-top: 3rem; border-bottom: 2px solid var(--line) } h3 { margin-top: 2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
small, .soft { color: var(--soft) }
.scale { position: relative; height: .9rem; min-width: 10rem; background: var(--line); border-radius: .2rem }
.scale i { position: absolute; top: .3rem; height: .3rem; background: var(--bar); opacity: .55 }
.scale b { position: absolute; top: 0; height: .9rem; width: 3px; background: var(--bar) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1.2rem }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-wrap: anywhere }
article img { max-width: 100%; display: block; margin-bottom: .6rem }
article p { margin: .3rem 0; white-space: pre-line }
.right { color: var(--good) } .wrong { color: var(--bad) }
"""


def write(arguments):
    """Write the page of the runs that the command line names."""
    runs = [open_run(path, arguments.data) for path in arguments.runs]
    groups = {}
    for run in runs:
        groups.setdefault((run["bench"].name, run["bench"].split), []).append(run)
    body = "".join(section(members) for members in groups.values())
    title = f"VisualRWKV: {len(runs)} run{'s' if len(runs) > 1 else ''}, {date.today()}"
    write_text(arguments.out, page(title, body))
    print(arguments.out)


def open_run(path, data=None):
    """A run folder with its benchmark and its score; what cannot be scored here says why."""
    path = Path(path)
    settings = read_run(path / RUN_FILE)
    if not settings:
        raise InputError(f"{path}: holds no {RUN_FILE}; pass folders that `visualrwkv eval` wrote")
    chosen = {name: settings[name] for name in ("sqa_suffix", "ocr") if name in settings}
    data = data or settings.get("data")
    if not data:
        raise InputError(
            f"{path / RUN_FILE}: does not say where the benchmark's files are; pass their folder as --data"
        )
    places = {"questions": settings.get("question_file"), "images": settings.get("images")}
    bench = benchmark(settings["benchmark"], data, split=settings.get("split"), **places, **chosen)
    run = {"name": str(path), "settings": settings, "bench": bench, "result": None, "reason": None, "each": []}
    try:
        run["result"] = score_files(bench, [path], each=True)
        run["each"] = run["result"]["each"]
    except InputError as error:
        print(f"{path}: not scored: {error}", file=sys.stderr)
        run["reason"] = str(error)
        with suppress(InputError):  # what was said can be compared all the same
            questions = bench.questions()
            answers = join(bench, questions, [path]).answers
            run["each"] = [(question, None, answer, None) for question, answer in zip(questions, answers, strict=True)]
    return run


def page(title, body):
    """A whole document; nothing in it is fetched from anywhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def section(runs):
    """All about one benchmark."""
    bench = runs[0]["bench"]
    scored = [run for run in runs if run["result"]]
    compared = [run for run in runs if run["each"]]
    note = f'<p class="soft">{escape(bench.note)}</p>' if bench.note else ""
    parts = [f"<h2>{escape(bench.title)} <small>{escape(bench.split)}</small></h2>{note}", score_table(runs)]
    parts += [breakdown_table(title, scored) for title in (scored[0]["result"]["breakdown"] if scored else ())]
    if len(compared) > 1:
        parts.append(differences(compared))
    return "\n".join([*parts, published_table(bench.name)])


def score_table(runs):
    rows = []
    for run in runs:
        settings = ", ".join(
            f"{name} {run['settings'][name]}" for name in _SETTINGS if run["settings"].get(name) is not None
        )
        name = f"<td>{escape(run['name'])}<br><small>{escape(settings)}</small></td>"
        if run["reason"]:
            rows.append(f'<tr>{name}<td colspan="4" class="soft">{escape(run["reason"])}</td></tr>')
            continue
        result = run["result"]
        low, high = result["interval"]
        full = _FULL.get(result["benchmark"], 100) / 100
        scale = (
            f'<div class="scale" role="img" aria-label="{low:.2f} to {high:.2f}">'
            f'<i style="left:{low / full:.2f}%;width:{(high - low) / full:.2f}%"></i>'
            f'<b style="left:{result["score"] / full:.2f}%"></b></div>'
        )
        others = "; ".join(f"{escape(key)} {value:.2f}" for key, value in result["scores"].items())
        missing = f", {result['missing']} missing" if result["missing"] else ""
        rows.append(
            f'<tr>{name}<td class="number">{result["score"]:.2f}<br><small>{low:.2f} to {high:.2f}</small></td>'
            f'<td>{scale}</td><td class="number">{result["counted"]}{missing}</td>'
            f"<td><small>{others}</small></td></tr>"
        )
    results = [run["result"] for run in runs if run["result"]]
    protocol = ""
    if results:
        protocol = (
            f'<p class="soft">Protocol {escape(results[0]["protocol"]["name"])}: '
            f"{escape(results[0]['protocol']['rule'])}. "
            f"Intervals: 95 %, bootstrap over {results[0]['interval_over']}.</p>"
        )
    metric = escape(results[0]["metric"]) if results else "score"
    further = "further" if any(result["scores"] for result in results) else ""
    head = f'<th>run</th><th class="number">{metric}</th><th></th><th class="number">questions</th><th>{further}</th>'
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>{protocol}'


def breakdown_table(title, runs):
    """Scores of the groups of one breakdown, a column for each run."""
    names = list(dict.fromkeys(name for run in runs for name in run["result"]["breakdown"][title]))
    head = "".join(f'<th class="number">{escape(run["name"])}</th>' for run in runs)
    rows = []
    for name in names:
        groups = [run["result"]["breakdown"][title].get(name, {}) for run in runs]
        numbers = [group.get("score", group.get("F1")) for group in groups]
        cells = "".join(f'<td class="number">{"" if n is None else f"{n:.2f}"}</td>' for n in numbers)
        count = max(group.get("questions", 0) for group in groups)
        rows.append(f'<tr><td>{escape(name)}</td><td class="number">{count}</td>{cells}</tr>')
    return (
        f'<details><summary>By {escape(title)}</summary><div class="scroll"><table><tr><th>{escape(title)}</th>'
        f'<th class="number">questions</th>{head}</tr>{"".join(rows)}</table></div></details>'
    )


def differences(runs):
    """Questions that the runs answer differently, those with the largest differences of scores first."""
    bench = runs[0]["bench"]
    entries = {}
    for number, run in enumerate(runs):
        for question, gold, answer, point in run["each"]:
            if point is not None or not run["result"]:
                key = bench.key(question.id), question.number
                entries.setdefault(key, (question, gold, {}))[2][number] = answer, point
    shared = [entry for entry in entries.values() if len(entry[2]) == len(runs)]
    differing = [entry for entry in shared if len({answer for answer, _ in entry[2].values()}) > 1]
    differing.sort(key=lambda entry: -_spread(entry))
    scored = any(run["result"] for run in runs)
    matter = f", {sum(_spread(entry) > 0 for entry in differing)} with different scores" if scored else ""
    cards = "".join(card(bench, runs, *entry) for entry in differing[:SHOWN])
    shown = f"; the first {SHOWN}" if len(differing) > SHOWN else ""
    head = f"Questions answered differently: {len(differing)}{matter}{shown}"
    return f'<h3>{head}</h3><div class="cards">{cards}</div>'


def _spread(entry):
    points = [point for _, point in entry[2].values() if point is not None]
    return max(points, default=0) - min(points, default=0)


def card(bench, runs, question, gold, answers):
    """One question with its picture, its references and what each run said."""
    lines = []
    for number, run in enumerate(runs):
        answer, point = answers[number]
        text = "<em>no prediction</em>" if answer is None else escape(answer) or "<em>empty</em>"
        kind = "" if point is None else "right" if point >= 0.5 else "wrong"
        name = run["name"] if point is None else f"{run['name']}, {100 * point:.0f}"
        lines.append(f'<p><small>{escape(name)}</small><br><span class="{kind}">{text}</span></p>')
    text = escape(question.turn().text.strip())
    head = str(question.id) if gold is None else f"{question.id}: {reference(gold)}"
    return (
        f"<article>{thumbnail(bench, question)}<p>{text}</p>"
        f'<p class="soft">{escape(head)}</p>{"".join(lines)}</article>'
    )


def reference(gold):
    """What a question is judged by, in words."""
    if isinstance(gold, tuple):
        gold = gold[0]
    if isinstance(gold, dict):
        gold = gold.get("answers", gold.get("answer"))
    if isinstance(gold, list):
        return ", ".join(f"{text} ({count})" for text, count in Counter(gold).most_common())
    return LETTERS[gold] if isinstance(gold, int) else str(gold)


def thumbnail(bench, question):
    """The picture as part of the page; a missing one is said, not shown."""
    if question.image is None:
        return ""
    from PIL import Image

    try:
        source = bench.picture(question)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            picture = file.convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
    except Exception as error:  # Pillow's decoders answer broken data with almost any
        return f'<p class="soft">{escape(str(error))}</p>'
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def published_table(name):
    rows = "".join(
        f'<tr><td>{escape(model)}</td><td class="number">{number}</td><td>{source}</td></tr>'
        for model, number, source in published(name)
    )
    return (
        f'<h3>Published <small>{escape(SPLITS[name])}</small></h3><div class="scroll"><table><tr><th>model</th>'
        f'<th class="number">number</th><th>source</th></tr>{rows}</table></div><p class="soft">P arXiv 2406.13362, '
        "H arXiv 2410.11665, R VisualRWKV README, E arXiv 2404.05892, L LLaVA model zoo, T TinyLLaVA, I Imp, B Bunny "
        "model cards.</p>"
    )
