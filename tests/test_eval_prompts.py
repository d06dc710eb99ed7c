"""Prompts are those of the reference, from the LLaVA pack and from the official files."""

import json
import shutil
from pathlib import Path

import pytest

from visualrwkv.cli import main
from visualrwkv.eval import benchmark
from visualrwkv.eval.answering import prompt_text
from visualrwkv.eval.common import Question

GOLDEN = Path(__file__).parent / "golden" / "eval"
POSITIONS = {"middle": "sandwich", "first": "first", "last": "last"}


def run_cli(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def prompts():
    return [json.loads(line) for line in (GOLDEN / "prompts/expected_prompts.jsonl").read_text().splitlines()]


PACKS = {"scienceqa": "questions_CQM-A.json", "textvqa": "questions_ocr.jsonl"}


@pytest.mark.parametrize(
    "name", "vqav2 scienceqa textvqa gqa vizwiz pope mme mmbench mmbench_cn mmvet seedbench".split()
)
def test_prompts_are_those_of_the_reference(name, prompts):
    folder = GOLDEN / name.removesuffix("_cn")
    pack = folder / PACKS.get(name, "questions.jsonl")
    official = {"ocr": False} if name == "textvqa" else {}
    if name == "mmbench_cn":  # the made-up file has an English name
        pack = folder / "mmbench_dev_made_up.tsv"
        official = {"questions": pack}
    made = benchmark(name, folder, **official).numbered(benchmark(name, folder, **official).convert())
    read = benchmark(name, folder, questions=pack if pack.exists() else None).questions()
    assert len(made) == len(read)
    by_key = {(benchmark(name, folder).key(question.id), question.text): question for question in made}
    checked = 0
    for entry in prompts:
        if entry["benchmark"] == name:
            question, position = read[entry["line"]], POSITIONS[entry["image_position"]]
            assert question.id == entry["question_id"]
            assert prompt_text(question, position) == entry["prompt"]
            if name != "textvqa":  # the official file does not hold the OCR words
                twin = by_key[benchmark(name, folder).key(question.id), question.text.replace("<image>\n", "")]
                assert prompt_text(twin, position) == entry["prompt"]
            checked += 1
    assert checked >= 12


def test_ocr_words_of_the_official_file_make_the_line_of_the_pack(tmp_path, capsys):
    shutil.copy(GOLDEN / "textvqa/TextVQA_0.5.1_val.json", tmp_path)
    code = run_cli("eval", "textvqa", "--data", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and "llava_textvqa_val_v051_ocr.jsonl: missing" in capsys.readouterr().err
    pack = [json.loads(line) for line in (GOLDEN / "textvqa/questions_ocr.jsonl").read_text().splitlines()]
    tokens = {}
    for record in pack:
        words = record["text"].split("\n")[1].removeprefix("Reference OCR token: ")
        tokens[record["question_id"]] = words.split(", ") if words else []
    data = [{"image_id": image, "ocr_tokens": words} for image, words in tokens.items()]
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps({"data": data}))
    made = benchmark("textvqa", tmp_path).questions()
    # in the made-up pack two questions about a picture may have different words
    same = [q.text == record["text"] for q, record in zip(made, pack, strict=True)]
    assert sum(same) >= len(tokens) and made[-1].text == pack[-1]["text"]
    bare = benchmark("textvqa", tmp_path, questions=GOLDEN / "textvqa/questions_ocr.jsonl", ocr=False).questions()
    made = benchmark("textvqa", tmp_path, ocr=False).questions()
    assert [q.text.casefold() for q in bare] == [q.text.casefold() for q in made]
    assert not any("OCR" in question.text for question in bare)


def test_edge_texts(prompts):
    for entry in prompts:
        if entry["benchmark"] == "edge":
            question = Question("x", entry["text"], "picture.png")
            assert prompt_text(question, POSITIONS[entry["image_position"]]) == entry["prompt"]
