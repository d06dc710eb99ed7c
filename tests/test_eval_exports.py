"""Upload files equal those of the reference."""

import json
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from visualrwkv.cli import main
from visualrwkv.eval import benchmark

GOLDEN = Path(__file__).parent / "golden" / "eval"


def expected(name, file="expected.json"):
    return json.loads((GOLDEN / name / file).read_text(encoding="utf-8"))


def exported(name, out, *more, answers="answers.jsonl"):
    data = GOLDEN / name
    arguments = ["export", name, "--data", data, "--predictions", data / answers, "--out", out, *more]
    assert main([str(argument) for argument in arguments]) == 0
    return out


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vqav2", "expected_submission.json"),
        ("gqa", "expected_predictions.json"),
        ("vizwiz", "expected_submission.json"),
        ("mmvet", "expected_results.json"),
    ],
)
def test_json_uploads(name, file, tmp_path):
    assert json.loads(exported(name, tmp_path / "up.json").read_bytes()) == expected(name, file)


def test_scienceqa_result_file(tmp_path):
    written = json.loads(exported("scienceqa", tmp_path / "result.json").read_bytes())
    want = expected("scienceqa")["results_json"]
    assert {name: written[name] for name in want if name != "outputs"} == {
        name: value for name, value in want.items() if name != "outputs"
    }
    assert {id: text for id, text in written["outputs"].items()} == {
        entry["question_id"]: entry["prediction"]
        for entry in expected("scienceqa")["per_question"]
        if entry["prediction"] is not None
    }

    analysis = json.loads((tmp_path / "result_analysis.json").read_text())
    right = {entry["question_id"] for entry in expected("scienceqa")["per_question"] if entry["correct"]}
    assert {entry["question_id"] for entry in analysis["correct"]} == right
    assert len(analysis["correct"]) == written["correct"]
    assert len(analysis["correct"]) + len(analysis["incorrect"]) == written["count"]
    assert all(entry["parsed"] == entry["answer"] for entry in analysis["correct"])


def test_seedbench_upload(tmp_path):
    written = exported("seedbench", tmp_path / "up.jsonl").read_text()
    assert written == (GOLDEN / "seedbench" / "expected_submission.jsonl").read_text()


def test_mme_result_files(tmp_path):
    folder = exported("mme", tmp_path / "results")
    theirs = {path.name: sorted(path.read_text().splitlines()) for path in GOLDEN.glob("mme/expected_results_txt/*")}
    assert {path.name: sorted(path.read_text().splitlines()) for path in folder.iterdir()} == theirs


def test_an_answer_of_mme_is_one_line_for_every_reader(tmp_path):
    bench = benchmark("mme", GOLDEN / "mme")
    questions = bench.exported()
    bench.export(questions, ["Yes\rit\u2028is\n"] * len(questions), tmp_path / "results")
    for path in (tmp_path / "results").iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert all(line.count("\t") == 3 and line.endswith("\tYes it is") for line in lines)


def test_pope_answer_files(tmp_path):
    folder = exported("pope", tmp_path / "answers", answers="answers_shuffled.jsonl")
    lines = [json.loads(line) for line in (folder / "coco_pope_popular_answers.json").read_text().splitlines()]
    labels = [json.loads(line) for line in (GOLDEN / "pope/coco/coco_pope_popular.json").read_text().splitlines()]
    assert [line["question"] for line in lines] == [label["text"] for label in labels]
    said = [e["prediction"] for e in expected("pope")["per_question"] if e["category"] == "popular"]
    assert [line["answer"] for line in lines] == said


def test_mmbench_sheet(tmp_path):
    with zipfile.ZipFile(exported("mmbench", tmp_path / "up.xlsx")) as file:
        sheet = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml"))
    tag = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    rows = []
    for row in sheet.iter(f"{tag}row"):
        cells = {cell.get("r").rstrip("0123456789"): "".join(cell.itertext()) for cell in row}
        rows.append([cells.get(chr(ord("A") + column)) for column in range(9)])
    want = expected("mmbench", "expected_submission_table.json")
    assert rows[0] == want["columns"]
    expected_rows = [[row[name] if row[name] is None else str(row[name]) for name in want["columns"]]
                     for row in want["rows"]]  # fmt: skip
    assert rows[1:] == expected_rows


def test_a_sheet_takes_what_its_format_cannot_hold(tmp_path):
    """A reply of a model that writes bytes, or of another tool, may hold anything that JSON can."""
    odd = ["half \ud83d a character", "no \uffff character", "a bell \x07", "<b>&amp;"]
    records = [json.loads(line) for line in (GOLDEN / "mmbench" / "answers.jsonl").read_text().splitlines()]
    for record, text in zip(records, odd, strict=False):
        record["text"] = text
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with zipfile.ZipFile(exported("mmbench", tmp_path / "up.xlsx", answers=tmp_path / "odd.jsonl")) as file:
        words = list(ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml")).itertext())
    assert {"half ? a character", "no  character", "a bell ", "<b>&amp;"} <= set(words)


def test_export_of_test_holds_all_its_ids_and_says_what_is_missing(tmp_path, capsys):
    ids = {"test": (1, 2, 3), "test-dev": (2, 3)}
    for split, members in ids.items():
        questions = [{"image_id": 9, "question": f"Is it {i}?", "question_id": i} for i in members]
        name = f"v2_OpenEnded_mscoco_{split}2015_questions.json"
        (tmp_path / name).write_text(json.dumps({"questions": questions}))
    (tmp_path / "p.jsonl").write_text('{"question_id": 3, "text": "Two."}\n')
    arguments = ["export", "vqav2", "--data", tmp_path, "--predictions", tmp_path / "p.jsonl", "--out", tmp_path / "up"]
    assert main(list(map(str, arguments))) == 0
    answers = {1: "", 2: "", 3: "2"}
    written = json.loads((tmp_path / "up").read_bytes())
    assert written == [{"question_id": id, "answer": answer} for id, answer in answers.items()]
    assert "1 answers of test-dev are empty (first: id 2)" in capsys.readouterr().err


def test_vizwiz_export_is_complete_or_refused(tmp_path, capsys):
    lines = (GOLDEN / "vizwiz/answers.jsonl").read_text().splitlines()
    (tmp_path / "p.jsonl").write_text("\n".join(lines[1:]) + "\n")
    arguments = ["export", "vizwiz", "--data", GOLDEN / "vizwiz", "--predictions", tmp_path / "p.jsonl", "--out"]
    arguments = list(map(str, [*arguments, tmp_path / "up.json"]))
    assert main(arguments) == 2 and not (tmp_path / "up.json").exists()
    assert "1 questions have no prediction (first: id 0)" in capsys.readouterr().err
    assert main([*arguments, "--fill-missing"]) == 0
    assert json.loads((tmp_path / "up.json").read_bytes())[0]["answer"] == "unanswerable"
