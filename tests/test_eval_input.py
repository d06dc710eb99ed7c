"""Files of a benchmark: wrong ones are refused in one line, and nothing of the answers reaches a question."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from visualrwkv.cli import main
from visualrwkv.errors import InputError
from visualrwkv.eval import BENCHMARKS, benchmark
from visualrwkv.eval.commands import score_files

GOLDEN = Path(__file__).parent / "golden" / "eval"


def run_cli(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


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
    if name == "mmbench_cn":  # the made-up file has an English name
        packs = sorted(copy.glob("*.tsv"))
    for pack in packs:
        here = None if pack is None else source / pack.name
        options = {"ocr": False} if name == "textvqa" and pack is None else {}
        changed = benchmark(name, copy, questions=pack, **options).questions()
        texts = [question.text for question in changed]
        assert texts == [question.text for question in benchmark(name, source, questions=here, **options).questions()]
        assert not any("GOLD" in text or "Maybe" in text for text in texts)


def test_an_unknown_setting_is_refused():
    with pytest.raises(InputError, match="gqa does not know the setting ocr=True"):
        benchmark("gqa", GOLDEN / "gqa", ocr=True)


def test_words_decide_where_an_id_occurs_twice(tmp_path):
    """A run numbers the questions of its own file, which may have them in another order or not all of them."""
    questions = benchmark("mme", GOLDEN / "mme").scored()
    gold = benchmark("mme", GOLDEN / "mme").gold(questions)
    for order in (1, -1):
        lines, seen = [], Counter()
        for question, label in list(zip(questions, gold, strict=True))[::order]:
            record = {"question_id": question.id, "prompt": f"User: {question.text}\n", "text": label}
            lines.append(json.dumps(record | {"metadata": {"number": seen[question.id]}}))
            seen[question.id] += 1
        (tmp_path / "p.jsonl").write_text("\n".join(lines))
        result = score_files(benchmark("mme", GOLDEN / "mme"), [tmp_path / "p.jsonl"], each=True)
        assert {point for *_, point in result["each"]} == {1.0} and result["interval_over"] == "pictures"
    (tmp_path / "p.jsonl").write_text(json.dumps({**json.loads(lines[0]), "prompt": "User: Is it Monday?\n"}))
    with pytest.raises(InputError, match="line 1: id .* answers another question"):
        score_files(benchmark("mme", GOLDEN / "mme"), [tmp_path / "p.jsonl"])


def test_the_order_of_records_decides_where_two_questions_are_the_same(tmp_path):
    """Of other tools, whose records have no number, and wherever their files were cut."""
    data = [
        {"image_id": "a", "question": text, "question_id": number, "answers": [answer] * 10}
        for number, (text, answer) in enumerate((("what is it?", "cup"), ("who?", "me"), ("what is it?", "mug")))
    ]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    for prompts in (("What is it?", "Who?", "What is it?"), (None, None, None)):
        records = [
            {"question_id": "a", "text": one["answers"][0]} | ({"prompt": prompt} if prompt else {})
            for one, prompt in zip(data, prompts, strict=True)
        ]
        files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
        for cut in range(4):
            for file, some in zip(files, (records[:cut], records[cut:]), strict=True):
                file.write_text("".join(json.dumps(record) + "\n" for record in some))
            result = score_files(benchmark("textvqa", tmp_path, ocr=False), files)
            assert (result["score"], result["missing"], result["protocol"]["run"]) == (100, 0, {"ocr": False})


def test_joined_files_of_a_run_are_read(tmp_path):
    lines = (GOLDEN / "pope/answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "merge.jsonl").write_text("".join(lines[:-2]) + "[" * 100_000 + "\n")
    wrong = json.dumps(json.loads(lines[0]) | {"text": "neither"}) + "\n"
    (tmp_path / "12_9.jsonl").write_text(wrong)
    (tmp_path / "12_10.jsonl").write_text("".join([lines[0], *lines[-2:]]))  # of a key the last shard counts
    bench = benchmark("pope", GOLDEN / "pope")
    assert score_files(bench, [tmp_path]) == score_files(bench, [GOLDEN / "pope/answers.jsonl"])


def test_the_folders_of_visualrwkv_are_known(tmp_path):
    """Its `eval_dir`: question files in eval/<name>, some pictures in images/<name>."""
    for name in ("gqa", "textvqa", "mme", "mmvet", "mmbench", "mmbench_cn"):
        folder = {"mme": "MME", "mmvet": "mm-vet", "mmbench_cn": "mmbench"}.get(name, name)
        shutil.copytree(GOLDEN / folder.replace("-", "").lower(), tmp_path / "eval" / folder, dirs_exist_ok=True)
        plain = GOLDEN / folder.replace("-", "").lower()
        questions = None if "mmbench" not in name else tmp_path / "eval/mmbench/mmbench_dev_made_up.tsv"
        options = {"questions": questions} | ({"ocr": False} if name == "textvqa" else {})
        inner, outer = benchmark(name, plain, **options), benchmark(name, tmp_path, **options)
        assert [q.text for q in inner.questions()] == [q.text for q in outer.questions()]
    bench = benchmark("gqa", tmp_path)
    question = bench.questions()[0]
    path = tmp_path / "images/gqa/images" / question.image
    with pytest.raises(InputError, match=f"belongs to .*{re.escape(str(path))}"):
        bench.picture(question)
    path.parent.mkdir(parents=True)
    path.touch()
    assert bench.picture(question) == path


def test_pictures_that_a_table_lacks_are_named(tmp_path):
    table = tmp_path / "MMBench_DEV_EN.tsv"
    table.write_text("index\tquestion\tA\tB\tanswer\timage\n1\tq\ta\tb\tA\tx\n2\tq\ta\tb\tA\t\n3\tq\ta\tb\tA\t777\n")
    bench = benchmark("mmbench", tmp_path)
    for question, reason in zip(bench.questions(), ("base64", "the cell is empty", "in row 777"), strict=True):
        with pytest.raises(InputError, match=f"MMBench_DEV_EN.tsv: .*row {question.id}.*{reason}"):
            bench.picture(question)
    table.write_text("index\tquestion\tA\tB\n1\tq\ta\tb\n")
    (question,) = benchmark("mmbench", tmp_path).questions()
    bench.source = table
    with pytest.raises(InputError, match="lacks 'image'"):
        bench.picture(question)
    mme = benchmark("mme", GOLDEN / "mme")
    with pytest.raises(InputError, match=r"no picture existence/\d+.jpg; it belongs to"):
        mme.picture(next(q for q in mme.scored() if q.category == "existence"))


def test_a_question_file_is_no_prediction_file(tmp_path):
    questions = GOLDEN / "pope/questions.jsonl"
    with pytest.raises(InputError, match="questions.jsonl, line 1: id .* has the question as its text"):
        score_files(benchmark("pope", GOLDEN / "pope"), [questions])
    shutil.copy(questions, tmp_path / "questions.jsonl")
    shutil.copy(GOLDEN / "pope/answers.jsonl", tmp_path / "1_0.jsonl")  # a run in the folder of the pack
    assert score_files(benchmark("pope", GOLDEN / "pope"), [tmp_path])["missing"] == 0


def test_a_byte_order_mark_costs_nothing(tmp_path):
    def marked(path):
        (tmp_path / path.name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        return tmp_path / path.name

    for path in (GOLDEN / "pope/coco").iterdir():
        marked(path)
    marked(GOLDEN / "pope/questions.jsonl")
    result = score_files(benchmark("pope", tmp_path), [marked(GOLDEN / "pope/answers.jsonl")])
    assert result == score_files(benchmark("pope", GOLDEN / "pope"), [GOLDEN / "pope/answers.jsonl"])
    table = marked(GOLDEN / "mmbench/mmbench_dev_made_up.tsv")
    made, plain = (benchmark("mmbench", folder) for folder in (tmp_path, GOLDEN / "mmbench"))
    assert [q.text for q in made.questions()] == [q.text for q in plain.questions()] and made.source == table
    for ours, theirs in zip(made.questions()[::7], plain.questions()[::7], strict=True):
        assert made.picture(ours) == plain.picture(theirs)


def test_the_table_of_one_language_is_not_taken_for_the_other(tmp_path):
    table = (GOLDEN / "mmbench/mmbench_dev_made_up.tsv").read_bytes()
    names = {"mmbench": "MMBench_DEV_EN_V11.tsv", "mmbench_cn": "mmbench_dev_cn_20231003.tsv"}
    for name, other in (("mmbench", "mmbench_cn"), ("mmbench_cn", "mmbench")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / names[name]).write_bytes(table)
        assert benchmark(name, folder).questions()
        with pytest.raises(InputError, match=r"\d+.tsv: missing"):
            benchmark(other, folder).questions()
        assert benchmark(other, folder, questions=folder / names[name]).questions()


def changed(tmp_path, name, path, change):
    """A copy of a benchmark's files with a change in one of them."""
    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / name, folder)
    text = (folder / path).read_text(encoding="utf-8")
    assert change(text) != text
    (folder / path).write_text(change(text), encoding="utf-8")
    return folder


def test_damaged_official_files_are_one_line(tmp_path, capsys):
    cases = [
        ("pope", "coco/coco_pope_popular.json", lambda text: text.replace('"yes"', '"Yes"', 1), "is 'Yes', not yes or"),
        ("pope", "questions.jsonl", lambda text: text.replace('"popular"', '"default"', 1), "is 'default'; take"),
        ("gqa", "testdev_balanced_questions.json", lambda text: text.replace('"argument"', '"argument_"', 1),
         "it lacks 'argument'"),
        ("gqa", "testdev_balanced_questions.json", lambda text: text.replace('Balanced": true', 'Balanced": false'),
         "none of its questions is balanced"),
        ("mmbench", "mmbench_dev_made_up.tsv", lambda text: re.sub(r"\n(\d+)\t", r"\n\1.0\t", text, count=1),
         "not a TSV file of MMBench"),
        ("mmbench", "mmbench_dev_made_up.tsv", lambda text: text.replace("\n", "\r"), "new-line character"),
        ("mmbench", "mmbench_dev_made_up.tsv",
         lambda text: re.sub(r"\n(\d{1,6})\t", lambda found: f"\n{int(found[1]) + 5_000_000}\t", text),
         "all of its questions are rotations"),
        ("gqa", "testdev_balanced_questions.json", lambda text: re.sub(r'"global": ("\w+"|null)', '"global": {}', text),
         "is no text"),
        ("scienceqa", "problems.json", lambda text: re.sub(r'"answer": \d', '"answer": -1', text, count=1),
         "is -1, which is none of its choices"),
        ("scienceqa", "problems.json", lambda text: re.sub(r'"grade": "(\w+)"', r'"grade": ["\1"]', text),
         "not a text"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda text: re.sub(r'"answers": \[[^]]*\]', '"answers": []', text),
         "has no list of answers"),
        ("vizwiz", "val.json", lambda text: re.sub(r'"answer": "[^"]*"', '"answer": 5', text, count=1),
         "or one that is no text"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", lambda text: "[" * 100_000, "recursion"),
    ]  # fmt: skip
    for name, path, change, words in cases:
        folder = changed(tmp_path, name, path, change)
        code, out, err = run_cli(
            capsys, "score", name, "--data", folder, "--predictions", GOLDEN / name / "answers.jsonl"
        )
        assert code == 2 and out == "" and words in err and err.count("\n") == 1, (name, err)
        assert str(folder / path) in err
    code, _, err = run_cli(capsys, "score", "pope", "--data", GOLDEN / "pope", "--predictions", "x", "--seed", "-1")
    assert code == 2 and err == "visualrwkv: error: --seed is -1; use a whole number from 0\n"


def test_odd_questions_of_a_pack(tmp_path):
    lines = ['{"question_id": 1, "text": "Half \\ud83d?", "image": "a.jpg"}']
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    (question,) = benchmark("vqav2", tmp_path, questions=tmp_path / "q.jsonl").questions()
    assert question.text == "Half ??"  # half a character could not be written
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "What?", "image": 7}')
    with pytest.raises(InputError, match="q.jsonl: the picture of id 1 is 7; it must be a file name"):
        benchmark("vqav2", tmp_path, questions=tmp_path / "q.jsonl").questions()
