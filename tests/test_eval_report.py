"""The report: one page that needs nothing else, with scores, differing questions and published numbers."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from visualrwkv.cli import main
from visualrwkv.eval import BENCHMARKS
from visualrwkv.eval.published import published

GOLDEN = Path(__file__).parent / "golden" / "eval"


class Page(HTMLParser):
    """Collects the text and whatever a browser would fetch; unbalanced tags are an error."""

    def __init__(self, text):
        super().__init__()
        self.text, self.sources, self.tags, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def pope_runs(tmp_path):
    """Two runs over the golden POPE questions; the second says otherwise in the first question, with markup."""
    data = tmp_path / "data"
    shutil.copytree(GOLDEN / "pope", data)
    questions = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    (data / "val2014").mkdir()
    for name in {question["image"] for question in questions}:
        Image.new("RGB", (640, 320), (200, 30, 30)).save(data / "val2014" / name)
    lines = (data / "answers.jsonl").read_text().splitlines(keepends=True)
    for name, text in (("one", None), ("two", "No <script>alert(1)</script>")):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"benchmark": "pope", "split": "test", "model": name, "prompt": "first", "data": str(data)}
        (folder / "run.json").write_text(json.dumps(settings))
        first = json.loads(lines[0]) | ({"text": text} if text else {})
        (folder / "1_0.jsonl").write_text(json.dumps(first) + "\n" + "".join(lines[1:]))
    return tmp_path


def report(folder, *runs, more=()):
    out = folder / "page.html"
    code = main(["report", *(str(folder / run) for run in runs), "--out", str(out), *more])
    return code, Page(out.read_text(encoding="utf-8")) if code == 0 else None


def test_two_runs_on_one_page(pope_runs):
    code, page = report(pope_runs, "one", "two")
    assert code == 0
    text = " ".join(" ".join(page.text).split())
    assert "POPE" in text and "70.73" in text and "prompt first" in text
    assert (
        "Questions answered differently: 1, 1 with different scores" in text
        and "Is there a kettle in the image?" in text
    )
    assert "script" not in page.tags and "No <script>alert(1)</script>" in text
    (picture,) = page.sources
    assert picture.startswith("data:image/jpeg;base64,") and len(picture) < 20000
    assert "VisualRWKV, RWKV-6 1.6B 83.2 P" in text


def test_a_run_alone_and_one_that_has_no_local_score(pope_runs, capsys):
    folder = pope_runs / "vet"
    folder.mkdir()
    settings = {"benchmark": "mmvet", "split": "test", "model": "m", "data": str(GOLDEN / "mmvet")}
    (folder / "run.json").write_text(json.dumps(settings))
    shutil.copy(GOLDEN / "mmvet/answers.jsonl", folder)
    code, page = report(pope_runs, "one", "vet")
    text = " ".join(page.text)
    assert code == 0 and "graded by GPT-4" in text and "answered differently" not in text
    assert f"{folder}: not scored" in capsys.readouterr().err


def test_answers_are_compared_where_nothing_here_can_score_them(pope_runs):
    lines = (GOLDEN / "mmvet/answers.jsonl").read_text().splitlines()
    settings = {"benchmark": "mmvet", "split": "test", "model": "m", "data": str(GOLDEN / "mmvet")}
    for name in ("this", "that"):
        (pope_runs / name).mkdir()
        (pope_runs / name / "run.json").write_text(json.dumps(settings))
        first = json.loads(lines[0]) | {"text": f"I see {name} & more"}
        (pope_runs / name / "1_0.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]))
    code, page = report(pope_runs, "this", "that")
    text = " ".join(" ".join(page.text).split())
    assert code == 0 and "graded by GPT-4" in text and "I see this & more" in text and "I see that & more" in text
    assert "Questions answered differently: 1 " in text


def test_a_damaged_picture_is_said_and_not_shown(pope_runs):
    folder, data = pope_runs / "data/val2014", b""
    for path in folder.iterdir():
        Image.new("RGB", (64, 32)).save(path, "PNG")
        data = path.read_bytes()
        at = data.index(b"IDAT")
        path.write_bytes(data[: at - 4] + b"\0\0\0\1" + data[at:])  # a wrong length: Pillow has a SyntaxError for it
    code, page = report(pope_runs, "one", "two")
    assert code == 0 and page.sources == [] and "broken PNG file" in " ".join(page.text)


def test_a_run_whose_files_are_elsewhere(pope_runs, capsys):
    file = pope_runs / "one/run.json"
    settings = json.loads(file.read_text())
    data = settings.pop("data")
    file.write_text(json.dumps(settings))
    code, _ = report(pope_runs, "one")
    assert code == 2 and "run.json: does not say where" in capsys.readouterr().err
    code, page = report(pope_runs, "one", more=["--data", data])
    assert code == 0 and "70.73" in " ".join(page.text)


def test_what_is_no_run_is_refused(pope_runs, capsys):
    code, _ = report(pope_runs, "data")
    assert code == 2 and "data: holds no run.json; pass folders" in capsys.readouterr().err


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_numbers_exist(name):
    rows = published(name)
    assert rows and all(0 < float(number) <= 2000 for _, number, _ in rows)


def test_published_numbers_are_those_of_the_paper():
    found = {name: dict((model, number) for model, number, _ in published(name)) for name in BENCHMARKS}
    model = "VisualRWKV, RWKV-6 7B"
    assert {name: rows[model] for name, rows in found.items() if model in rows} == {
        "vqav2": "75.82", "gqa": "64.27", "scienceqa": "68.22", "textvqa": "51.01", "pope": "84.7", "mme": "1387.75",
        "mmbench": "65.8", "mmbench_cn": "63.7",
    }  # fmt: skip
