"""`visualrwkv score` and `visualrwkv export`: from prediction files to numbers, without a model."""

import contextlib
import gc
import json
import sys
from pathlib import Path

from visualrwkv.errors import InputError
from visualrwkv.eval import benchmark
from visualrwkv.eval.predictions import join
from visualrwkv.eval.scores import rounded, table

RUN_FILE = "run.json"
# what the predictions of a run depend on: the questions, and how they are answered (a model is the same if its
# fingerprint is)
ASKED = ("benchmark", "split", "sqa_suffix", "ocr", "questions_sha256")
COMPARED = (*ASKED, "fingerprint", "dtype", "quantize", "prompt", "max_new_tokens", "blank_image")


def score(arguments):
    """Print the score of a benchmark."""
    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}; use a whole number from 0")
    bench = open_benchmark(arguments, run_of(arguments.predictions))
    with no_collections():
        result = score_files(
            bench, arguments.predictions, arguments.protocol, arguments.require_complete, arguments.seed
        )
    print(json.dumps(result, ensure_ascii=False) if arguments.json else table(result))


def export(arguments):
    """Write the upload file of a benchmark's server: of the test split where its questions are there."""
    run = run_of(arguments.predictions)
    bench = open_benchmark(arguments, run)
    # the server takes all of test, of which test-dev is a part
    if arguments.split is None and run.get("split") in (None, "test-dev") and bench.has("test"):
        bench.split = "test"
    if hasattr(bench, "fill_missing"):
        bench.fill_missing = arguments.fill_missing
    elif arguments.fill_missing:
        raise InputError(f"--fill-missing is for vizwiz; the file of {bench.name} leaves missing answers empty")
    check_run(bench, arguments.predictions)
    questions = bench.exported()
    found = join(bench, questions, arguments.predictions)
    report_gaps(bench, found, arguments.require_complete)
    bench.export(questions, found.answers, arguments.out)
    print(arguments.out)


@contextlib.contextmanager
def no_collections():
    """Millions of objects are read and none is dropped: looking for garbage among them takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def open_benchmark(arguments, run=None):
    """The benchmark that the command line names; what it leaves open is as in the run that wrote the predictions."""
    run = run if run and run["benchmark"] == arguments.benchmark else {}
    names = {
        "split": "split",
        "questions": "question_file",
        "images": "images",
        "sqa_suffix": "sqa_suffix",
        "ocr": "ocr",
    }
    options = {}
    for name, in_run in names.items():
        value = getattr(arguments, name, None)
        value = run.get(in_run) if value is None else value
        if value is not None:
            options[name] = value
    return benchmark(arguments.benchmark, arguments.data, **options)


def run_of(paths):
    """Settings of the run that wrote the first of these files that a run wrote, {} if they are not ours."""
    folders = (path if path.is_dir() else path.parent for path in map(Path, paths))
    return next(filter(None, (read_run(folder / RUN_FILE) for folder in folders)), {})


def score_files(bench, paths, protocol=None, require_complete=False, seed=0, each=False):
    """The score of prediction files as one JSON object.

    Args:
        bench: a `common.Benchmark`.
        paths: prediction files or run folders.
        protocol: one of `bench.protocols`; the first by default.
        require_complete: a missing prediction is an error rather than wrong.
        seed: of the bootstrap.
        each: add the score of every question, for the report.
    """
    if protocol is not None and protocol not in bench.protocols:
        known = ", ".join(bench.protocols) or "none"
        raise InputError(f"protocol {protocol!r} is not one of {bench.title}'s: {known}")
    run = check_run(bench, paths)
    questions = bench.scored()
    gold = bench.gold(questions)
    found = join(bench, questions, paths)
    report_gaps(bench, found, require_complete)
    protocol = protocol or next(iter(bench.protocols))
    scores = bench.judge(questions, gold, found.answers, protocol, seed)
    result = {
        "benchmark": bench.name,
        "title": bench.title,
        "split": bench.split,
        "protocol": {"name": protocol, "rule": bench.protocols[protocol], "note": bench.note, "run": run},
        "metric": scores.metric,
        "score": scores.value,
        "interval": list(scores.interval),
        "interval_over": scores.unit,
        "questions": len(questions),
        "counted": len(questions) if scores.counted is None else scores.counted,
        "missing": len(found.missing),
        "unknown": found.unknown,
        "scores": scores.values,
        "breakdown": scores.groups,
    }
    if each:
        result["each"] = list(zip(questions, gold, found.answers, scores.points, strict=True))
        return result
    return rounded(result)


def check_run(bench, paths):
    """Settings of the run that wrote the files, where they are not ours those that were stated; refuses those of
    another benchmark or run."""
    settings = run_of(paths)
    for path in paths:
        run = run_of([path])
        if run and run["benchmark"] != bench.name:
            raise InputError(
                f"{path}: holds predictions of {run['benchmark']}, not of {bench.name}; see its {RUN_FILE}"
            )
        name = differing(settings, run) if run else None
        if name is not None:
            raise InputError(
                f"{path}: its run has another {name} than that of {paths[0]}; score one run at a time, or compare "
                "them with `visualrwkv report`"
            )
    shown = ("model", "prompt", "dtype", "quantize", "max_new_tokens", "blank_image", *bench.settings)
    return bench.stated | {name: settings[name] for name in shown if settings.get(name) is not None}


def differing(known, settings, compared=COMPARED):
    """The first of the compared settings that two runs do not share; None if there is none."""
    return next((name for name in compared if name in settings and known.get(name) != settings[name]), None)


def read_run(file):
    """The settings that a run folder was made with, {} if there are none."""
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        return run if isinstance(run["benchmark"], str) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be read ({type(error).__name__}), so nothing tells how the predictions beside it were "
            "made; restore it, or use another folder"
        ) from None


def report_gaps(bench, found, require_complete):
    """Say on stderr what was missing or left over."""
    if found.unknown:
        print(f"{found.unknown} predictions belong to no question and were left out, the first: {found.first_unknown}",
              file=sys.stderr)  # fmt: skip
    if found.missing:
        text = (
            f"{len(found.missing)} of {len(found.answers)} questions have no prediction (first: id {found.missing[0]})"
        )
        if require_complete:
            raise InputError(f"{bench.title}: {text}; finish the run, or leave out --require-complete")
        print(text, file=sys.stderr)
