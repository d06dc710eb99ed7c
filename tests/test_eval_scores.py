"""Scores and upload files equal those of the reference scorers; nothing here needs torch."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from visualrwkv.cli import main
from visualrwkv.errors import InputError
from visualrwkv.eval import BENCHMARKS, benchmark
from visualrwkv.eval.commands import score_files
from visualrwkv.eval.normalise import CONTRACTIONS, evalai, punctuation, soft_accuracy, vqa, words
from visualrwkv.eval.predictions import join
from visualrwkv.eval.scores import bootstrap, ratio

GOLDEN = Path(__file__).parent / "golden" / "eval"


def expected(name, file="expected.json"):
    return json.loads((GOLDEN / name / file).read_text(encoding="utf-8"))


def scored(name, protocol=None, answers="answers.jsonl", folder=None, **options):
    """The result with a score for every question."""
    data = GOLDEN / (folder or name)
    return score_files(benchmark(name, data, **options), [data / answers], protocol, each=True)


def points(result):
    return [point for *_, point in result["each"]]


def means(groups, column="score"):
    return {name: pytest.approx(numbers[column], abs=5e-3) for name, numbers in groups.items()}


VQA_PROTOCOLS = {
    "official": "official_2021_on_export",
    "official-raw": "official_2021_on_raw",
    "official-2017": "official_2017_on_export",
    "visualrwkv": "visualrwkv_eval_vqa",
    "lmms-eval": "lmms_eval_val",
}


@pytest.mark.parametrize("protocol", VQA_PROTOCOLS)
def test_vqav2(protocol):
    want, result = expected("vqav2"), scored("vqav2", protocol)
    numbers = want["scores"][VQA_PROTOCOLS[protocol]]
    assert round(result["score"], 2) == numbers["overall"]
    if "perAnswerType" in numbers:
        assert numbers["perAnswerType"] == means(result["breakdown"]["answer type"])
    if "perQuestionType" in numbers:
        assert numbers["perQuestionType"] == means(result["breakdown"]["question type"])
    name = {"lmms-eval": "lmms_eval"}.get(protocol, VQA_PROTOCOLS[protocol])
    by_id = {entry["question_id"]: entry["scores"][name] for entry in want["per_question"]}
    for question, _, _, point in result["each"]:
        assert round(100 * point, 2) == by_id[question.id], question
    assert result["missing"] == len(want["missing_question_ids"])


SCIENCEQA_PROTOCOLS = {
    "paper": ("accuracy", "img_accuracy", "correct"),
    "lmms-eval": ("lmms_eval_accuracy", "lmms_eval_img_accuracy", "correct_lmms_eval"),
    "vlmevalkit": ("vlmevalkit_exact_matching_accuracy", None, "correct_vlmevalkit_exact_matching"),
}


@pytest.mark.parametrize("protocol", SCIENCEQA_PROTOCOLS)
def test_scienceqa(protocol):
    want, result = expected("scienceqa"), scored("scienceqa", protocol)
    accuracy, pictured, correct = SCIENCEQA_PROTOCOLS[protocol]
    assert round(result["scores"]["accuracy"], 2) == want["scores"][accuracy]
    if pictured:
        assert round(result["score"], 2) == want["scores"][pictured]
    assert [bool(point) for point in points(result)] == [entry[correct] for entry in want["per_question"]]
    if protocol == "paper":
        answered = round(result["scores"]["IMG accuracy of the answered"], 2)
        assert answered == want["scores"]["img_accuracy_prompt_based_reference"]
        groups = {
            name: g for title in ("subject", "context", "grade") for name, g in result["breakdown"][title].items()
        }
        assert {**want["breakdown"], "Avg": 36.17} == {**means(groups), "Avg": 36.17}
        topics = {name: value for name, value in want["per_topic"].items() if value is not None}
        assert topics == means(result["breakdown"]["topic"])
        assert (result["missing"], result["unknown"]) == (3, 1)


def test_textvqa():
    want, result = expected("textvqa"), scored("textvqa")
    assert round(result["score"], 2) == want["scores"]["missing_counted_as_zero"]
    assert round(result["scores"]["accuracy of the answered"], 2) == want["scores"]["reference_over_predicted_only"]
    assert [round(100 * point, 2) for point in points(result)] == [entry["score"] for entry in want["per_question"]]
    for entry in want["per_question"]:
        if entry["prediction"] is not None:
            assert evalai(entry["prediction"]) == entry["processed"]


GQA_PROTOCOLS = {
    "official": ("accuracy", "correct"),
    "lmms-eval": ("lmms_eval_exact_match_balanced", "correct_lmms_eval"),
    "vlmevalkit": ("vlmevalkit_accuracy_balanced", "correct_vlmevalkit"),
}


@pytest.mark.parametrize("protocol", GQA_PROTOCOLS)
def test_gqa(protocol):
    want, result = expected("gqa"), scored("gqa", protocol)
    name, correct = GQA_PROTOCOLS[protocol]
    assert round(result["score"], 4) == want["scores"][name]
    by_id = {entry["questionId"]: entry for entry in want["per_question"]}
    for question, record, _, point in result["each"]:
        assert (point is None) != record["isBalanced"]
        if record["isBalanced"] and question.id in by_id:
            assert bool(point) == bool(by_id[question.id][correct]), question
    if protocol == "official":
        for name in ("binary", "open", "distribution"):
            assert round(result["scores"][name], 4) == want["scores"][name]
        titles = {"structural type": "StructuralType", "semantic type": "SemanticType", "words": "Length",
                  "steps": "Steps"}  # fmt: skip
        for title, theirs in titles.items():
            groups = {
                name: {"accuracy": round(group["score"], 4), "count": group["questions"]}
                for name, group in result["breakdown"][title].items()
            }
            assert groups == want["by_type"][f"accuracyPer{theirs}"]


VIZWIZ_PROTOCOLS = {"official": "official_on_export", "official-raw": "official_on_raw", "lmms-eval": "lmms_eval_val"}


@pytest.mark.parametrize("protocol", VIZWIZ_PROTOCOLS)
def test_vizwiz(protocol):
    want, result = expected("vizwiz"), scored("vizwiz", protocol)
    name = VIZWIZ_PROTOCOLS[protocol]
    assert round(result["score"], 2) == want["scores"][name]
    name = f"score_{name.removesuffix('_val')}"
    assert [round(100 * point, 2) for point in points(result)] == [entry[name] for entry in want["per_question"]]
    unanswerable = want["unanswerability_from_exported_text"]
    assert round(result["scores"]["unanswerable, average precision"], 2) == unanswerable["average_precision"]
    assert round(result["scores"]["unanswerable, F1"], 2) == unanswerable["f1_score"]


POPE_NAMES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "F1": "f1",
    "yes ratio": "yes_ratio",
}


@pytest.mark.parametrize("answers", ["answers.jsonl", "answers_shuffled.jsonl"])
def test_pope(answers):
    want, result = expected("pope")["scores"], scored("pope", answers=answers)
    assert round(result["score"] / 100, 6) == want["average_over_categories"]["f1"]
    for category, numbers in result["breakdown"]["category"].items():
        theirs = want["per_category"][category]
        assert [numbers[name] for name in ("questions", "TP", "FP", "TN", "FN")] == [
            theirs[name] for name in ("n", "TP", "FP", "TN", "FN")
        ]
        assert {POPE_NAMES[name]: round(numbers[name] / 100, 6) for name in POPE_NAMES}.items() <= theirs.items()
    means = {"f1": result["score"]} | {POPE_NAMES[name]: result["scores"][name] for name in POPE_NAMES if name != "F1"}
    # the reference averages numbers that it has rounded
    assert {name: value / 100 for name, value in means.items()} == pytest.approx(
        want["average_over_categories"], abs=1.1e-6
    )
    assert [bool(p) for p in points(result)] == [entry["correct"] for entry in expected("pope")["per_question"]]


def test_pope_as_lmms_eval_scores_it():
    want, result = expected("pope"), scored("pope", "lmms-eval")
    assert [bool(p) for p in points(result)] == [entry["correct_lmms_eval"] for entry in want["per_question"]]
    for category, theirs in want["scores"]["lmms_eval_per_category"].items():
        numbers = result["breakdown"]["category"][category]
        for name in ("accuracy", "precision", "recall", "F1"):
            assert round(numbers[name] / 100, 6) == theirs[POPE_NAMES[name]]


@pytest.mark.parametrize("protocol", ["paper", "lmms-eval"])
def test_mme(protocol):
    want, result = expected("mme"), scored("mme", protocol)
    if protocol == "lmms-eval":
        assert round(result["score"], 4) == want["scores"]["lmms_eval"]["mme_perception_score"]
        assert round(result["scores"]["cognition"], 4) == want["scores"]["lmms_eval"]["mme_cognition_score"]
        return
    assert round(result["score"], 4) == want["scores"]["perception"]
    assert round(result["scores"]["cognition"], 4) == want["scores"]["cognition"]
    assert round(result["scores"]["total"], 4) == want["scores"]["total"]
    names = {"questions": "n_questions", "images": "n_images", "acc": "acc", "acc+": "acc_plus", "score": "score",
             "other": "n_other"}  # fmt: skip
    groups = {
        category: {theirs: round(numbers[ours], 4) for ours, theirs in names.items()}
        for category, numbers in result["breakdown"]["category"].items()
    }
    assert groups == want["per_category"]
    correct = {(e["question_id"].replace("/images/", "/"), e["question"]): e["correct"] for e in want["per_question"]}
    for question, _, _, point in result["each"]:
        ((key, right),) = [
            (key, right) for key, right in correct.items()
            if key[0] == question.id or (key[0].rpartition(".")[0] == question.id.rpartition(".")[0])
            if question.text.startswith(key[1].replace(" Please answer yes or no.", ""))
        ]  # fmt: skip
        assert bool(point) == right, key


def test_mmbench():
    want, result = expected("mmbench"), scored("mmbench")
    assert round(result["score"], 4) == want["scores"]["circular"]
    assert result["scores"]["vanilla accuracy, first pass"] == want["scores"]["vanilla_first_pass"]
    assert result["scores"]["vanilla accuracy, all rows"] == want["scores"]["vanilla_all_rows"]
    for title, theirs in (("l2-category", "circular_per_l2_category"), ("category", "circular_per_category")):
        groups = {name: round(group["score"], 4) for name, group in result["breakdown"][title].items()}
        assert groups == want[theirs]
    rows = {entry["index"]: entry["hit"] for entry in want["per_row"]}
    assert {question.id: point for question, _, _, point in result["each"]} == rows


def test_seedbench():
    want, result = expected("seedbench"), scored("seedbench")
    numbers = {name: round(group["score"], 2) for name, group in result["breakdown"]["type"].items()}
    numbers |= {name: round(result["scores"][name], 2) for name in ("image accuracy", "video accuracy")}
    assert numbers | {"Total accuracy": round(result["score"], 2)} == want["scores"]
    assert round(scored("seedbench", "lmms-eval")["score"], 2) == want["lmms_eval"]["all"]
    assert [bool(point) for point in points(result)] == [entry["correct"] for entry in want["per_question"]]


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


def test_seedbench_upload(tmp_path):
    written = exported("seedbench", tmp_path / "up.jsonl").read_text()
    assert written == (GOLDEN / "seedbench" / "expected_submission.jsonl").read_text()


def test_mme_result_files(tmp_path):
    folder = exported("mme", tmp_path / "results")
    theirs = {path.name: sorted(path.read_text().splitlines()) for path in GOLDEN.glob("mme/expected_results_txt/*")}
    assert {path.name: sorted(path.read_text().splitlines()) for path in folder.iterdir()} == theirs


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


def test_words_of_the_contraction_table():
    assert words("A dont She'dve The wont two None") == "don't she'd've won't 2 0"
    assert CONTRACTIONS["yall'd've"] == "y'all'd've" and CONTRACTIONS["somebody'd"] == "somebodyd"
    assert len(CONTRACTIONS) == len(set(CONTRACTIONS)) and words("Im late") == "im late"


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("5.", "5"), ("3.5", "3.5"), ("v2.0.", "v2.0"), ("t-shirt", "t shirt"), ("black - white", "black  white"),
        ("1,000", "1000"), ("." * 40, "." * 8), ("don't: 5% & #1", "don't: 5% & #1"),
    ],
)  # fmt: skip
def test_punctuation(text, after):
    assert punctuation(text) == after


def test_evalai_keeps_its_side_effects():
    assert [evalai(text) for text in ("men's", "fruit,vegetables", "1,000", "A", "Yes.\nNo")] == [
        "men 's", "fruitvegetables", "1000", "", "yes no"
    ]  # fmt: skip
    assert vqa("The two dogs!") == "2 dogs"


def test_soft_accuracy_leaves_each_annotator_out():
    for matches, value in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        assert soft_accuracy(matches) == pytest.approx(value)
    one_by_one = [min(1, (2 - (i < 2)) / 3) for i in range(5)]
    assert soft_accuracy(2, 5) == pytest.approx(np.mean(one_by_one))


def test_the_interval_is_that_of_resampled_questions():
    rng = np.random.default_rng(3)
    rows = np.stack([rng.choice([0, 0.3, 1], 400), np.ones(400)], 1)
    low, high = bootstrap(rows, lambda totals: ratio(totals[:, 0], totals[:, 1]))
    plain = [rows[rng.integers(0, 400, 400), 0].mean() for _ in range(1000)]
    assert [low, high] == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.01)
    again = bootstrap(rows, lambda totals: ratio(totals[:, 0], totals[:, 1]))
    other = bootstrap(rows, lambda totals: ratio(totals[:, 0], totals[:, 1]), seed=1)
    assert (low, high) == again != other


def test_a_cut_file_gives_its_complete_lines():
    bench = benchmark("vqav2", GOLDEN / "vqav2")
    questions = bench.scored()
    found = join(bench, questions, [GOLDEN / "vqav2/answers_interrupted.jsonl"])
    want = expected("vqav2", "expected_resume.json")
    assert sorted(found.missing) == sorted(want["remaining_question_ids"])
    done = [question.id for question, answer in zip(questions, found.answers, strict=True) if answer is not None]
    assert sorted(done) == sorted(want["complete_question_ids"])


def test_missing_predictions_are_wrong_whatever_silence_would_parse_as(tmp_path):
    lines = (GOLDEN / "pope/answers.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in (GOLDEN / "pope/questions.jsonl").read_text().splitlines()]
    (tmp_path / "p.jsonl").write_text(lines[0] + "\n")
    result = score_files(benchmark("pope", GOLDEN / "pope"), [tmp_path / "p.jsonl"], each=True)
    assert sum(points(result)) == 1 and result["missing"] == len(questions) - 1


def run_cli(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_and_table_say_the_same(capsys):
    data = GOLDEN / "pope"
    call = ["score", "pope", "--data", data, "--predictions", data / "answers.jsonl"]
    code, out, _ = run_cli(capsys, *call, "--json")
    result = json.loads(out)
    assert code == 0 and result["protocol"]["name"] == "paper" and result["missing"] == 0
    low, high = result["interval"]
    assert low < result["score"] < high
    code, out, err = run_cli(capsys, *call)
    assert code == 0 and err == ""
    assert f"{result['score']:.2f}" in out and f"{low:.2f} to {high:.2f}" in out and "adversarial" in out


def wrong_calls(tmp_path):
    """(words of the message, arguments of score)."""
    other = tmp_path / "gqa.jsonl"
    other.write_text((GOLDEN / "gqa/answers.jsonl").read_text())
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for path in (GOLDEN / "vqav2").glob("v2_*"):
        (swapped / path.name).write_bytes((GOLDEN / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").read_bytes())
    holes = tmp_path / "holes"
    holes.mkdir()
    for path in (GOLDEN / "vqav2").glob("v2_*"):
        content = json.loads(path.read_text())
        if "annotations" in content:
            content["annotations"].pop(3)
        (holes / path.name).write_text(json.dumps(content))
    (tmp_path / "empty").mkdir()
    (tmp_path / "lines.jsonl").write_text('{"question_id": 42000, "prompt": "Is it Monday?", "text": "no"}\n')
    vqa_data, vqa_answers = GOLDEN / "vqav2", GOLDEN / "vqav2/answers.jsonl"
    return [
        (f"{other}, line 1: id '201307000'", "vqav2", vqa_data, other),
        ("v2_mscoco_val2014_annotations.json: not an annotation file", "vqav2", swapped, vqa_answers),
        ("annotations.json: no annotation of question 49001", "vqav2", holes, vqa_answers),
        ("v2_OpenEnded_mscoco_val2014_questions.json: missing; put the file there", "vqav2", tmp_path / "empty", other),
        (f"{tmp_path / 'lines.jsonl'}, line 1: id 42000 answers another", "vqav2", vqa_data, tmp_path / "lines.jsonl"),
        (f"{tmp_path / 'none.jsonl'}: cannot be read", "vqav2", vqa_data, tmp_path / "none.jsonl"),
        (f"{tmp_path / 'nowhere'}: no such folder", "vqav2", tmp_path / "nowhere", other),
        ("'vqav3' is unknown; choose one of vqav2, scienceqa", "vqav3", vqa_data, other),
        ("mmvet has no local score", "mmvet", GOLDEN / "mmvet", GOLDEN / "mmvet/answers.jsonl"),
        ("protocol 'x' is not one of VQA v2's: official,", "vqav2", vqa_data, vqa_answers, "--protocol", "x"),
        ("split 'x' is not one of", "vqav2", vqa_data, vqa_answers, "--split", "x"),
        ("1 of 48 questions have no prediction (first: id 182000)", "vqav2", vqa_data, vqa_answers,
         "--require-complete"),
    ]  # fmt: skip


def test_question_files_of_another_kind_are_refused(tmp_path, capsys):
    lines = {
        "it lacks 'image'": '{"question_id": 1, "text": "What?"}',
        "the question with id 7 has no text": '{"question_id": 7, "text": null, "image": "a.jpg"}',
        "not a file of JSON lines": "question,answer",
        "there is no question of GQA in it": "",
    }
    for words_, line in lines.items():
        (tmp_path / "q.jsonl").write_text(line + "\n")
        code, out, err = run_cli(capsys, "eval", "gqa", "--data", tmp_path, "--questions", tmp_path / "q.jsonl",
                                 "--out", tmp_path / "run")  # fmt: skip
        assert code == 2 and out == "" and err.count("\n") == 1
        assert (
            f"{tmp_path / 'q.jsonl'}: {words_}" in err
            or f"q.jsonl: not a question file in the LLaVA form: {words_}" in err
        )


def test_what_cannot_be_scored_is_one_line(tmp_path, capsys):
    for words_, name, data, predictions, *more in wrong_calls(tmp_path):
        code, out, err = run_cli(capsys, "score", name, "--data", data, "--predictions", predictions, *more)
        assert code == 2 and out == "", words_
        assert words_ in err and err.count("\n") == 1 and err.startswith("visualrwkv: error: "), err


def test_another_revision_of_pope_is_refused(tmp_path, capsys):
    for path in (GOLDEN / "pope/coco").iterdir():
        lines = path.read_text().splitlines(keepends=True)
        (tmp_path / path.name).write_text("".join(lines[1:] if "popular" in path.name else lines))
    (tmp_path / "questions.jsonl").write_text((GOLDEN / "pope/questions.jsonl").read_text())
    code, _, err = run_cli(capsys, "score", "pope", "--data", tmp_path, "--predictions", GOLDEN / "pope/answers.jsonl")
    assert code == 2 and "coco_pope_popular.json: its line for id 10000001" in err and "revision" in err


def without_answers(name, source, target):
    """A copy of the official files in which every answer is another one."""
    target.mkdir()
    for path in sorted(source.rglob("*")):
        if not path.is_file() or path.name.startswith(("answers", "expected")):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            text = re.sub(r"\t(Yes|No)$", "\tMaybe", text, flags=re.M)
        elif path.suffix == ".tsv":
            rows = [line.split("\t") for line in text.split("\n")]
            at = rows[0].index("answer")
            text = "\n".join("\t".join(cell if i != at or n == 0 else "GOLD" for i, cell in enumerate(row))
                             for n, row in enumerate(rows))  # fmt: skip
        elif name == "pope" and "coco" in path.parts[-2]:
            text = re.sub(r'"label": "\w+"', '"label": "GOLD"', text)
        elif path.suffix == ".json":
            text = json.dumps(_hidden(json.loads(text)))
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    return target


def _hidden(value, key=""):
    if isinstance(value, dict):
        if value.get("from") == "gpt":
            return {"from": "gpt", "value": "GOLD"}
        gold = ("answer", "answers", "multiple_choice_answer", "fullAnswer", "solution", "lecture", "answer_type")
        return {name: "GOLD" if name in gold else _hidden(item) for name, item in value.items()}
    return [_hidden(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_answer_reaches_a_question(name, tmp_path):
    source = GOLDEN / name.removesuffix("_cn")
    copy = without_answers(name, source, tmp_path / "copy")
    packs = [None, *sorted(copy.glob("questions*.json*"))]
    for pack in packs:
        here = None if pack is None else source / pack.name
        options = {"ocr": False} if name == "textvqa" and pack is None else {}
        changed = benchmark(name, copy, questions=pack, **options).questions()
        texts = [question.text for question in changed]
        assert texts == [question.text for question in benchmark(name, source, questions=here, **options).questions()]
        assert not any("GOLD" in text or "Maybe" in text for text in texts)


def test_scoring_never_imports_torch():
    script = """
import sys
from visualrwkv.cli import main

import visualrwkv.eval.report
code = main(sys.argv[1:])
assert not {"torch", "transformers", "PIL"} & set(sys.modules), "a model library was imported"
sys.exit(code)
"""
    data = GOLDEN / "pope"
    call = ["score", "pope", "--data", data, "--predictions", data / "answers.jsonl"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, call)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_an_unknown_setting_is_refused():
    with pytest.raises(InputError, match="gqa does not know the setting ocr=True"):
        benchmark("gqa", GOLDEN / "gqa", ocr=True)
