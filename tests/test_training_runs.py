"""A training run from outside: its folder, its log, stopping and going on."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_recipes import changed, weights

from visualrwkv.errors import InputError

pytest.importorskip("accelerate")

from visualrwkv import training
from visualrwkv.data import ScenesDataset


class SendSignal:
    """Sends a signal to this process when sample `at` is drawn."""

    def __init__(self, monkeypatch, at, number=signal.SIGINT):
        original = ScenesDataset.__getitem__

        def get(dataset, index):
            if index == at:
                os.kill(os.getpid(), number)
            return original(dataset, index)

        monkeypatch.setattr(ScenesDataset, "__getitem__", get)


@pytest.mark.parametrize("options", [[], ["accumulate=2", "precision=bf16", "train.vision=1e-3"]])
def test_an_interrupted_run_resumes_bitwise(recipe, tmp_path, monkeypatch, capsys, options):
    options = ["steps=5", "save_every=100", "weight_decay=0.1", "warmup=2", *options]
    assert training.run(recipe("whole"), options) == 0
    per_step = 4 if "accumulate=2" in options else 2
    with monkeypatch.context() as patch:
        SendSignal(patch, at=2 * per_step)  # while the third step's samples are drawn
        assert training.run(recipe("parts"), options) == 130
    line = next(line for line in capsys.readouterr().err.splitlines() if "stopped at step" in line)
    assert "of 5; the same command resumes from" in line
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert training.run(recipe("parts"), options) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert not changed(whole, parts)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_signals_get_their_handlers_back(recipe):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    training.run(recipe(), ["steps=1"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_rest_of_a_run_may_learn_at_another_rate(recipe, tmp_path, capsys):
    assert training.run(recipe(), ["steps=2", "save_every=2"]) == 0
    (tmp_path / "run" / "model.safetensors").unlink()
    options = ["steps=4", "train.projector=1e-5", "train.language=1e-6", "final_rate=1", "weight_decay=0"]
    assert training.run(recipe(), options) == 0
    *_, last = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert last["step"] == 4 and last["lr"] == pytest.approx({"projector": 1e-5, "language": 1e-6})
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(InputError, match="other parts learned there"):
        training.run(recipe(), ["steps=6", "train={projector: 1e-3}"])
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before


def test_a_full_disk_keeps_the_last_good_checkpoint(recipe, tmp_path, monkeypatch):
    original, calls = torch.save, []

    def save(content, path, *args, **kwargs):
        calls.append(path)
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(InputError) as error:
            training.run(recipe())
    assert "No space left on device" in str(error.value) and "checkpoint-2" in str(error.value)
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    assert training.run(recipe()) == 0


def test_only_complete_checkpoints_count(tmp_path):
    from visualrwkv.runs import newest_checkpoint

    assert newest_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"")
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"


def test_resume_can_be_refused_or_named(recipe, tmp_path):
    training.run(recipe(), ["steps=2"])
    with pytest.raises(InputError, match="holds checkpoint-2 of an earlier run"):
        training.run(recipe(), ["steps=4", "resume=none"])
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        training.run(recipe(), [f"resume={tmp_path / 'nothing'}"])
    assert training.run(recipe(), ["steps=3", f"resume={tmp_path / 'run' / 'checkpoint-2'}"]) == 0


@pytest.fixture
def own_samples(tmp_path):
    """A LLaVA file without pictures."""
    turns = [{"from": "human", "value": "What"}, {"from": "gpt", "value": "red"}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": turns}] * 3))
    return path


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_folder_of_another_run_is_refused(recipe, tmp_path, own_samples, capsys):
    """The former run's model must not be handed out as this one's."""
    options = ["data.scenes=null", f"data.json={own_samples}", "steps=2"]
    assert training.run(recipe(), options) == 0
    other = tmp_path / "other.json"
    other.write_bytes(own_samples.read_bytes())
    for option, told in ((f"data.json={other}", "data.json '"), ("seed=3", "run with seed 0, this one has 3")):
        with pytest.raises(InputError, match="checkpoint-2: is of a run with ") as error:
            training.run(recipe(), [*options, option])
        assert told in str(error.value) and "choose another output, or resume=" in str(error.value)
    named = f"resume={tmp_path / 'run' / 'checkpoint-2'}"
    capsys.readouterr()
    assert training.run(recipe(), [*options, "steps=3", f"data.json={other}", named]) == 0
    assert f"goes on from {tmp_path / 'run' / 'checkpoint-2'}" in capsys.readouterr().err


def test_steps_of_another_size_are_refused(recipe, tmp_path):
    """Step 2 of 2 samples each is not step 2 of 4 each: samples would be left out or seen twice."""
    assert training.run(recipe(), ["steps=2"]) == 0
    with pytest.raises(InputError, match="its steps have 2 samples .* those of this run 4; keep the product"):
        training.run(recipe(), ["batch_size=4"])
    with pytest.raises(InputError, match=r"freeze_layers \[\]; keep that"):
        training.run(recipe(), ["freeze_layers=[1]"])
    assert training.run(recipe(), ["batch_size=1", "accumulate=2"]) == 0


def test_the_rest_of_a_run_is_saved_and_logged_as_often_as_its_recipe_says(recipe, tmp_path):
    assert training.run(recipe(), ["steps=2", "keep=9", "log_every=2"]) == 0
    assert training.run(recipe(), ["steps=5", "keep=9", "log_every=1", "save_every=1"]) == 0
    assert {folder.name[11:] for folder in (tmp_path / "run").glob("checkpoint-*")} == set("2345")
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [2, 3, 4, 5]


def test_the_log_tells_the_rate_of_its_step_and_leaves_none_out(recipe, tmp_path):
    assert training.run(recipe("each"), ["steps=3", "warmup=2", "final_rate=0.5", "save_every=9"]) == 0
    each = log_of(tmp_path / "each")
    assert [entry["lr"]["language"] for entry in each] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert training.run(recipe("all"), ["steps=3", "warmup=2", "final_rate=0.5", "save_every=9", "log_every=20"]) == 0
    (entry,) = log_of(tmp_path / "all")
    assert entry["step"] == 3 and entry["loss"] == pytest.approx(sum(e["loss"] for e in each) / 3, rel=1e-6)


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(recipe, tmp_path):
    options = ["steps=40", "save_every=1", "keep=50", "log_every=50", "clip=0", "warmup=3", "train={language: 1e5}"]
    with pytest.raises(InputError, match="is nan, nothing can be learned from here on; lower the rates") as error:
        training.run(recipe(), options)
    *_, last = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    assert f"resume={last} goes on from the last checkpoint" in str(error.value)
    assert all(torch.isfinite(value).all() for value in weights(last).values())


HOLD = """
import sys
from visualrwkv.runs import alone

with alone(sys.argv[1]):
    print(flush=True)
    input()
"""


def test_a_second_run_in_the_same_folder_is_refused(recipe, tmp_path):
    root = str(Path(training.__file__).parents[1])
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": root}, **pipes) as holder:
        holder.stdout.readline()
        with pytest.raises(InputError, match="another run is writing there"):
            training.run(recipe(), ["steps=1"])
        holder.communicate(b"\n")
    assert training.run(recipe(), ["steps=1"]) == 0
    assert not (tmp_path / "run" / ".lock").exists()


def test_an_interrupted_run_says_how_it_goes_on(recipe, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        SendSignal(patch, at=2)
        assert training.run(recipe(), ["resume=none"]) == 130
    assert f"stopped at step 1 of 4; resume={tmp_path / 'run' / 'checkpoint-1'} goes on" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written(recipe, monkeypatch):
    from visualrwkv.runs import WriteError, writing

    with pytest.raises(WriteError, match="Read-only file system.; choose another output"), writing(None, "out"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
