"""Runs: shards as the reference has them, resuming, batches, and scores of drawn scenes end to end."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from visualrwkv.cli import main
from visualrwkv.errors import InputError
from visualrwkv.eval import benchmark, run
from visualrwkv.eval.answering import Answerer, windows
from visualrwkv.eval.common import Question
from visualrwkv.eval.run import chunk, describe_model, which_shard

GOLDEN = Path(__file__).parent / "golden" / "eval"


def run_cli(*arguments):
    return main([str(argument) for argument in arguments])


def records(folder):
    """All complete prediction records of a run, in the order of their files."""
    lines = [line for path in sorted(Path(folder).glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if "text" in record]


def test_shards_are_those_of_the_reference_and_never_missing():
    for case in json.loads((GOLDEN / "chunking/reference_chunks.json").read_text()):
        parts = [list(chunk(case["n_questions"], case["num_chunks"], k)) for k in range(case["num_chunks"])]
        for part, theirs in zip(parts, case["reference_chunks"], strict=True):
            assert part == ([] if theirs == "IndexError" else theirs)
        assert sum(parts, []) == list(range(case["n_questions"]))


def test_torchrun_divides_each_shard():
    assert which_shard(None, {}) == (1, 0)
    assert which_shard("1/3", {}) == (3, 1)
    for rank, world in (("3", "1"), ("x", "2"), ("", "2"), ("0", "0")):
        with pytest.raises(InputError, match=f"RANK is '{rank}' and WORLD_SIZE '{world}'"):
            which_shard(None, {"RANK": rank, "WORLD_SIZE": world})
    assert [which_shard("1/2", {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)] == [(4, 2), (4, 3)]


def test_windows_keep_a_picture_together():
    questions = [Question(i, "?", image) for i, image in enumerate(["a", "b", None, "a", "c", None, "b", "a"])]
    images = [[question.image for question in window] for window in windows(questions, 3)]
    assert images == [["a", "a", "a"], ["b", "b", None], ["c", None]]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Drawn scenes in the official layouts, by benchmark."""
    from visualrwkv.scenes.writers import write_scenes

    folder = tmp_path_factory.mktemp("scenes")
    for name, pictures in (("vqav2", 20), ("scienceqa", 15), ("pope", 3)):
        write_scenes(folder / name, format=name, pictures=pictures, seed=7)
    return folder


def test_a_batch_answers_as_single_questions_and_encodes_a_picture_once(vlm, scenes, monkeypatch):
    bench = benchmark("vqav2", scenes / "vqav2")
    questions = bench.questions()
    encoded = []
    original = vlm.model.get_image_features
    monkeypatch.setattr(vlm.model, "get_image_features", lambda values: encoded.append(len(values)) or original(values))
    answers = {}
    for size in (1, 5):
        encoded.clear()
        answers[size] = {a.question.id: a for a in Answerer(vlm, bench, size, max_new_tokens=6).answers(questions)}
        assert sum(encoded) == len({question.image for question in questions}) < len(questions)
    assert {i: a.text for i, a in answers[1].items()} == {i: a.text for i, a in answers[5].items()}
    assert len({answer.text for answer in answers[1].values()}) > 1
    picture, text = bench.picture(questions[0]), questions[0].text
    assert answers[5][questions[0].id].text == vlm.ask(picture, text, max_new_tokens=6)


def test_equal_questions_about_a_picture_are_asked_once(vlm, scenes, monkeypatch):
    bench = benchmark("pope", scenes / "pope")
    questions = bench.questions()
    asked = []
    original = Answerer._ask
    monkeypatch.setattr(Answerer, "_ask", lambda self, rows, *more: asked.extend(rows) or original(self, rows, *more))
    answers = {a.question.id: a for a in Answerer(vlm, bench, 8, max_new_tokens=3).answers(questions)}
    assert set(answers) == {question.id for question in questions}
    assert len(asked) == len({(question.image, question.text) for question in questions}) < len(questions)
    for question in questions[::9]:
        assert answers[question.id].text == vlm.ask(bench.picture(question), question.text, max_new_tokens=3)


def test_pictures_in_a_tsv_are_read_where_they_stand(tmp_path):
    source = GOLDEN / "mmbench/mmbench_dev_made_up.tsv"
    header, *rows = [line.split("\t") for line in source.read_text(encoding="utf-8").splitlines()]
    at = header.index("image")
    whole = {row[0]: base64.b64decode(row[at]) for row in rows}
    rows[0][header.index("hint")] = '"two\nlines, and é"'  # offsets count bytes, and a cell may hold a line break
    for row in rows:
        if len(row[0]) > 3:  # the newer files name the row that has the picture
            row[at] = row[0][-3:]
    text = "\n".join("\t".join(row) for row in [header, *rows]) + "\n"
    (tmp_path / "mmbench_dev_en.tsv").write_text(text, encoding="utf-8")
    bench = benchmark("mmbench", tmp_path)
    questions = bench.questions()
    assert [bench.picture(question) for question in questions] == [whole[str(q.id)[-3:]] for q in questions]
    assert questions[0].text.startswith("two\nlines, and é\n")


def test_questions_without_a_picture_may_be_shown_an_empty_one(vlm, scenes):
    bench = benchmark("scienceqa", scenes / "scienceqa")
    questions = [question for question in bench.questions() if question.image is None] + bench.questions()[:1]
    assert len(questions) > 1
    plain = [a.text for a in Answerer(vlm, bench, 2, max_new_tokens=6).answers(questions)]
    answerer = Answerer(vlm, bench, 2, max_new_tokens=6, blank=True)
    ids, prompt = answerer._encode_prompt(questions[0])
    places = vlm.processor.num_image_tokens
    assert ids[:places] == [vlm.processor.image_token_id] * places and "<image>" not in prompt
    blank = [a.text for a in answerer.answers(questions)]
    assert blank == [a.text for a in Answerer(vlm, bench, 1, max_new_tokens=6, blank=True).answers(questions)]
    assert blank != plain


@pytest.fixture
def loaded(vlm, random_folder, monkeypatch):
    """Runs use the model that is already in memory; returns the options that name it."""
    monkeypatch.setattr("visualrwkv.eval.run.load_model", lambda arguments: vlm)
    return ["--model", random_folder, "--max-new-tokens", 4, "--batch-size", 4]


def test_a_run_goes_on_where_it_stopped_with_other_shards(loaded, scenes, tmp_path, capsys):
    data, whole, out = scenes / "vqav2", tmp_path / "whole", tmp_path / "run"
    call = ["eval", "vqav2", "--data", data, *loaded]
    assert run_cli(*call, "--out", whole) == 0
    assert run_cli(*call, "--out", out, "--shard", "1/3") == 0
    (part,) = out.glob("*.jsonl")
    assert part.name == "3_1.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # killed while it wrote
    capsys.readouterr()
    for shard in ("0/2", "1/2"):
        assert run_cli(*call, "--out", out, "--shard", shard) == 0
    assert capsys.readouterr().err.count("question/s") > 0
    texts = {record["question_id"]: record["text"] for record in records(whole)}
    done = [record for path in out.glob("2_*.jsonl") for record in map(json.loads, path.open())]
    done += [json.loads(line) for line in lines[:2]]
    assert {record["question_id"]: record["text"] for record in done} == texts and len(done) == len(texts)
    # the same shard again: its cut line is closed, nothing is asked twice
    before = part.read_bytes()
    assert run_cli(*call, "--out", out, "--shard", "1/3") == 0
    assert part.read_bytes() == before and "predictions are there" in capsys.readouterr().err


def test_a_cut_line_is_done_again_in_the_same_file(loaded, scenes, tmp_path):
    call = ["eval", "vqav2", "--data", scenes / "vqav2", "--out", tmp_path, *loaded]
    assert run_cli(*call) == 0
    (file,) = tmp_path.glob("*.jsonl")
    content = file.read_bytes()
    file.write_bytes(content[:-30])
    assert run_cli(*call) == 0
    assert file.read_bytes() == content[:-30] + b"\n" + content.splitlines(keepends=True)[-1]


def test_more_processes_than_questions(loaded, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "40")
    for rank in (0, 39):
        monkeypatch.setenv("RANK", str(rank))
        assert run_cli("eval", "scienceqa", "--data", scenes / "scienceqa", "--out", tmp_path, *loaded) == 0
    assert (tmp_path / "40_39.jsonl").read_bytes() == b"" and len(records(tmp_path)) == 1


def test_settings_are_not_mixed(loaded, scenes, tmp_path, capsys, monkeypatch):
    call = ["eval", "scienceqa", "--data", scenes / "scienceqa", "--out", tmp_path, *loaded]
    assert run_cli(*call, "--shard", "0/2") == 0
    capsys.readouterr()
    for more in (["--max-new-tokens", 5], ["--sqa-suffix", "option"], ["--split", "val"], ["--blank-image", "yes"]):
        assert run_cli(*call, *more) == 2
        assert "run.json: the run there has" in (err := capsys.readouterr().err) and err.count("\n") == 1
    monkeypatch.setattr("visualrwkv.VisualRWKV.fingerprint", lambda self: "another")
    assert run_cli(*call) == 2 and "fingerprint" in capsys.readouterr().err
    assert run_cli(*call, "--force") == 0
    other = [*call]
    other[1:4] = ["pope", "--data", scenes / "pope"]
    assert run_cli(*other) == 2
    assert "run.json: the run there has benchmark 'scienceqa'" in capsys.readouterr().err.splitlines()[-1]
    code = run_cli("score", "pope", "--data", scenes / "pope", "--predictions", tmp_path)
    assert code == 2 and "holds predictions of scienceqa, not of pope" in capsys.readouterr().err


def test_a_broken_picture_costs_its_questions_only(loaded, scenes, tmp_path, capsys):
    data = tmp_path / "vqav2"
    shutil.copytree(scenes / "vqav2", data)
    bench = benchmark("vqav2", data)
    questions = bench.questions()
    broken = data / "val2014" / questions[0].image
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    affected = [question.id for question in questions if question.image == questions[0].image]
    call = ["eval", "vqav2", "--data", data, "--out", tmp_path / "run", *loaded]
    assert run_cli(*call) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert f"id {affected[0]}: {broken}: " in last and f"{len(affected)} of {len(questions)} questions" in last
    assert {r["question_id"] for r in records(tmp_path / "run")} == {q.id for q in questions} - set(affected)
    broken.write_bytes(whole)
    assert run_cli(*call) == 0 and len(records(tmp_path / "run")) == len(questions)
    broken.unlink()
    shutil.rmtree(tmp_path / "run")
    assert run_cli(*call) == 2
    assert f"no picture {broken.name}; it belongs to {broken}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("--shard '2/2': use k/n with k from 0 to n - 1", ["--shard", "2/2"]),
        ("--shard 'x': use k/n", ["--shard", "x"]),
        ("--batch-size is 0", ["--batch-size", "0"]),
        ("gqa does not know the setting ocr=True", ["--ocr"]),
        ("nowhere.jsonl: no such file", ["--questions", "nowhere.jsonl"]),
    ],
)
def test_wrong_calls_are_one_line(words, more, tmp_path, capsys):
    assert run_cli("eval", "gqa", "--data", GOLDEN / "gqa", "--out", tmp_path / "run", *more) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import visualrwkv
from visualrwkv.cli import main
from visualrwkv.eval import run

model, data, out = sys.argv[1:4]
vlm = visualrwkv.load(model)
run.load_model = lambda arguments: vlm
call = ["eval", "vqav2", "--data", data, "--out", out, "--model", model, "--max-new-tokens", "3", "--batch-size", "3"]

def lines():
    return sum(path.read_bytes().count(b"\\n") for path in Path(out).glob("*.jsonl"))

rng = random.Random(1)
kills = 0
while True:
    child = os.fork()
    if not child:
        os._exit(main(call))
    before, wanted = lines(), rng.randint(1, 8)
    while not (done := os.waitpid(child, os.WNOHANG))[0] and lines() < before + wanted:
        time.sleep(0.001)
    if done[0]:
        print(kills, done[1])
        break
    time.sleep(rng.random() / 100)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_loses_what_is_in_flight_and_nothing_else(random_folder, scenes, tmp_path):
    data = scenes / "vqav2"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork must not inherit a thread pool
    done = subprocess.run(
        [sys.executable, "-c", KILLED, random_folder, data, tmp_path],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills, status = map(int, done.stdout.split())
    assert kills >= 2 and status == 0
    counts = Counter(record["question_id"] for record in records(tmp_path))
    assert set(counts.values()) == {1} and set(counts) == {q.id for q in benchmark("vqav2", data).questions()}


def test_a_score_is_about_the_split_and_questions_of_the_run(loaded, scenes, tmp_path, capsys):
    data, out = scenes / "scienceqa", tmp_path / "run"
    assert run_cli("eval", "scienceqa", "--data", data, "--split", "val", "--out", out, *loaded) == 0
    capsys.readouterr()
    assert run_cli("score", "scienceqa", "--data", data, "--predictions", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["split"] == "val"
    assert run_cli("export", "scienceqa", "--data", data, "--predictions", out, "--out", tmp_path / "up") == 0
    call = ["score", "scienceqa", "--data", data, "--predictions", out, "--split", "test"]
    assert run_cli(*call) == 2 and "no prediction fits" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vqav2", "scienceqa", "pope"])
def test_drawn_scenes_end_to_end(name, scenes, tmp_path, capsys):
    data = scenes / name
    assert run_cli("eval", name, "--data", data, "--out", tmp_path / "run", "--batch-size", 16) == 0
    capsys.readouterr()
    assert run_cli("score", name, "--data", data, "--predictions", tmp_path / "run", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    questions = benchmark(name, data).questions()
    assert result["missing"] == result["unknown"] == 0 and result["questions"] == len(questions)
    assert result["protocol"]["run"]["model"] == "embedded" and result["protocol"]["run"]["prompt"] == "sandwich"
    low, high = result["interval"]
    assert 0 <= low <= result["score"] <= high <= 100
    assert run_cli("export", name, "--data", data, "--predictions", tmp_path / "run", "--out", tmp_path / "up") == 0
    assert (tmp_path / "up").exists()


def test_torchrun_answers_all_that_can_be_asked(loaded, random_folder, scenes, tmp_path, monkeypatch):
    """The process with a broken picture has nothing else to do and fails first; the other one must not be stopped."""
    data, out = tmp_path / "vqav2", tmp_path / "run"
    shutil.copytree(scenes / "vqav2", data)
    questions = benchmark("vqav2", data).questions()
    (data / "val2014" / questions[0].image).write_bytes(b"broken")
    affected = {question.id for question in questions if question.image == questions[0].image}
    call = ["eval", "vqav2", "--data", data, "--out", out, "--model", random_folder, "--max-new-tokens", 300]
    assert run_cli(*call, "--shard", "0/2") == 2
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "visualrwkv.cli", *map(str, call)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and f"id {questions[0].id}: " in done.stderr, done.stderr
    assert {record["question_id"] for record in records(out)} == {question.id for question in questions} - affected


def test_a_full_disk_is_named_and_loses_nothing(loaded, scenes, tmp_path, capsys, monkeypatch):
    call = ["eval", "vqav2", "--data", scenes / "vqav2", "--out", tmp_path, *loaded]
    whole = len(benchmark("vqav2", scenes / "vqav2").questions())

    class Full:
        def __init__(self, file):
            self._file, self._left = file, 3

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            self._left -= 1
            if self._left < 0:
                raise OSError(28, "No space left on device")
            return self._file.write(data)

    original = run.write_answers
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_answers", lambda *a: original(*a[:3], Full(a[3]), *a[4:]))
        assert run_cli(*call) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / '1_0.jsonl'}: cannot be written: No space left on device" in last
    assert len(records(tmp_path)) == 3
    assert run_cli(*call) == 0 and len(records(tmp_path)) == whole
    # the settings are written whole or not at all
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run_cli(*call[:5], tmp_path / "new", *loaded) == 2
    assert "run.json: cannot be written: No space left" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["1_0.jsonl"]


def test_predictions_without_their_settings_are_not_gone_on_with(loaded, scenes, tmp_path, capsys):
    call = ["eval", "vqav2", "--data", scenes / "vqav2", "--out", tmp_path, *loaded]
    assert run_cli(*call, "--shard", "0/2") == 0
    (tmp_path / "run.json").unlink()
    capsys.readouterr()
    assert run_cli(*call) == 2 and "run.json: missing, so nothing tells how" in capsys.readouterr().err
    assert run_cli(*call, "--force") == 0
    (tmp_path / "run.json").write_text("{")
    capsys.readouterr()
    assert run_cli(*call) == 2 and "run.json: cannot be read (JSONDecodeError)" in capsys.readouterr().err


def test_a_complete_run_is_not_taken_for_that_of_another_model(loaded, scenes, tmp_path, capsys, monkeypatch):
    call = ["eval", "vqav2", "--data", scenes / "vqav2", "--out", tmp_path, *loaded]
    assert run_cli(*call) == 0
    capsys.readouterr()
    assert run_cli(*call) == 0 and "predictions are there" in capsys.readouterr().err
    monkeypatch.setattr("visualrwkv.VisualRWKV.fingerprint", lambda self: "another")
    assert run_cli(*call) == 2 and "the run there has fingerprint" in capsys.readouterr().err


def test_whether_an_empty_picture_is_shown_is_up_to_the_checkpoint(vlm, monkeypatch):
    assert [describe_model(vlm, how)["blank_image"] for how in ("auto", "yes", "no")] == [False, True, False]
    monkeypatch.setattr(vlm.model.config, "blank_image", True)
    assert [describe_model(vlm, how)["blank_image"] for how in ("auto", "yes", "no")] == [True, True, False]


def test_two_runs_make_no_score(loaded, scenes, tmp_path, capsys):
    call = ["eval", "pope", "--data", scenes / "pope", *loaded]
    for name, shard, tokens in (("a", "0/2", 4), ("b", "1/2", 4), ("c", "0/2", 3)):
        assert run_cli(*call, "--out", tmp_path / name, "--shard", shard, "--max-new-tokens", tokens) == 0
    capsys.readouterr()
    score = ["score", "pope", "--data", scenes / "pope", "--json", "--predictions", tmp_path / "a"]
    assert run_cli(*score, tmp_path / "b") == 0  # shards of two machines
    settings = json.loads(capsys.readouterr().out)["protocol"]["run"]
    assert settings["dtype"] == "float32" and settings["max_new_tokens"] == 4 and settings["blank_image"] is False
    assert run_cli(*score, tmp_path / "c") == 2
    assert "c: its run has another max_new_tokens than that of" in capsys.readouterr().err
