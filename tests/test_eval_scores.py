"""Scores equal those of the reference scorers; nothing here needs torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from visualrwkv.cli import main
from visualrwkv.eval import benchmark
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


def test_json_and_table_say_the_same(capsys):
    data = GOLDEN / "pope"
    call = ["score", "pope", "--data", str(data), "--predictions", str(data / "answers.jsonl")]
    assert main([*call, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"]["name"] == "paper" and result["missing"] == 0
    low, high = result["interval"]
    assert low < result["score"] < high
    assert main(call) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{result['score']:.2f}" in out and f"{low:.2f} to {high:.2f}" in out and "adversarial" in out


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
