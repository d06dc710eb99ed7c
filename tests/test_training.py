"""The training stages, each for a few steps on the tiny random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_recipes import BASE, changed, weights

from visualrwkv.errors import InputError

pytest.importorskip("accelerate")

from visualrwkv import trainer, training
from visualrwkv.building import build_model
from visualrwkv.data import Collator, ScenesDataset
from visualrwkv.recipe import ScenesData, load_recipe


def test_the_projector_stage_changes_the_projector_alone(recipe, tmp_path, random_folder):
    text = BASE.replace("instruction", "projector").replace(", language: 1.0e-3", "")
    assert training.run(recipe(text=text), ["steps=2"]) == 0
    assert changed(weights(random_folder), weights(tmp_path / "run")) == {"proj.weight"}
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2] and set(entries[0]["lr"]) == {"projector"}
    for name in ("recipe.yaml", "versions.json", "config.json", "processor_config.json", "rwkv_vocab.txt"):
        assert (tmp_path / "run" / name).is_file()
    assert load_recipe(tmp_path / "run" / "recipe.yaml").steps == 2


def test_a_warmup_that_never_ends_is_told(recipe, capsys):
    training.run(recipe("long"), ["steps=2", "warmup=2"])
    assert "warmup: 2 of 2 steps, so these rates are never reached" in capsys.readouterr().err
    training.run(recipe("short"), ["steps=2", "warmup=1"])
    assert "warmup:" not in capsys.readouterr().err


def test_the_result_answers(recipe, tmp_path, pictures):
    import visualrwkv

    training.run(recipe(), ["steps=1", "precision=bf16", "gradient_checkpointing=true", "l2_wrap=true"])
    answer = visualrwkv.load(tmp_path / "run").ask(pictures[0], "What", max_new_tokens=3)
    assert isinstance(answer, str)


def test_compiled_layers_learn_the_same(recipe, tmp_path):
    losses = {}
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        assert training.run(recipe(name), ["steps=3", f"compile={compiled}"]) == 0
        losses[name] = [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


def test_layers_that_cannot_be_compiled_learn_too(recipe, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert training.run(recipe(), ["steps=1", "compile=true"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compile:")]
    assert len(lines) == 1 and "'no-such-compiler'" in lines[0]


def test_frozen_layers_and_parts_stay(recipe, tmp_path, random_folder):
    training.run(recipe(), ["steps=2", "freeze_layers=[0, 2]", "train.projector=0", "train.vision=1e-3"])
    names = changed(weights(random_folder), weights(tmp_path / "run"))
    assert any(name.startswith("rwkv.blocks.1.") for name in names) and any(name.startswith("vit.") for name in names)
    assert not any(name.startswith(("rwkv.blocks.0.", "rwkv.blocks.2.", "proj.")) for name in names)
    with pytest.raises(InputError, match="freeze_layers: 3"):
        training.run(recipe("other"), ["freeze_layers=[3]"])


def test_weight_decay_is_for_matrices(vlm):
    groups = trainer.parameter_groups(
        vlm.model.named_parameters(), lambda name: name.split(".")[0], {"rwkv": 1e-3, "vit": 2e-3}, 0.1
    )
    try:
        by_id = {id(p): group for group in groups for p in group["params"]}
        parameters = dict(vlm.model.named_parameters())
        decay = {name: by_id[id(p)]["weight_decay"] for name, p in parameters.items() if id(p) in by_id}
        for name in ("blocks.0.att.key.weight", "emb.weight", "blocks.1.att.time_maa_w2", "blocks.1.att.time_decay_w1"):
            assert decay[f"rwkv.{name}"] == 0.1
        for name in ("att.time_maa_x", "att.time_decay", "att.time_faaaa", "att.ln_x.weight", "ln1.bias"):
            assert decay[f"rwkv.blocks.0.{name}"] == 0
        assert decay["vit.visual.positional_embedding"] == 0 and decay["vit.visual.conv1.weight"] == 0.1
        assert {group["part"]: group["lr"] for group in groups} == {"rwkv": 1e-3, "vit": 2e-3}
        assert not parameters["proj.weight"].requires_grad
    finally:
        vlm.model.requires_grad_(True)


def test_rates_warm_up_and_follow_a_cosine():
    share = trainer.rate_schedule(4, 104, 0.1)
    assert [share(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert share(54) == pytest.approx(0.55) and share(104) == pytest.approx(0.1) and share(500) == pytest.approx(0.1)


def test_accumulation_gives_the_gradient_of_the_whole_batch(vlm):
    dataset = ScenesDataset(ScenesData(seed=2, turns=(1, 3), sides=(96, 110)), vlm.processor, 2000, 4)
    items = [dataset[i] for i in range(4)]
    model = vlm.model.train()

    def gradient(*batches):
        model.zero_grad()
        for batch in batches:
            inputs = Collator()(batch)
            inputs.pop("skipped")
            (model(**inputs).loss / len(batches)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    try:
        whole, halves = gradient(items), gradient(items[:2], items[2:])
    finally:
        model.zero_grad()
        model.eval()
    for name, expected in whole.items():
        scale = expected.abs().max().clamp(min=1e-8)
        assert ((halves[name] - expected).abs().max() / scale) < 1e-4, name


def test_worker_processes_deliver_the_same_samples(recipe, tmp_path):
    training.run(recipe("alone"), ["steps=2"])
    training.run(recipe("worker"), ["steps=2", "workers=2"])
    assert not changed(weights(tmp_path / "alone"), weights(tmp_path / "worker"))


FAILING = """
import sys
from visualrwkv.cli import main

sys.exit(main(sys.argv[1:]))
"""


def test_an_error_in_a_worker_process_is_one_line_and_the_end(recipe, tmp_path):
    """Its workers hear no signal; the command must not wait for them."""
    options = ["workers=2", "data.scenes={kinds: {relation: 1}, objects: [1, 1]}"]
    command = [sys.executable, "-c", FAILING, "train", str(recipe()), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *_, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and last.startswith("visualrwkv: error: data.scenes: "), done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_stretch_is_told_before_the_run_begins(recipe, tmp_path):
    for wrong, message in (("kinds: {color: 1}", "kind of question 'color'"), ("objects: [4, 9]", "4 to 9 asked for")):
        option = f"data.scenes.curriculum=[{{until: 0.5}}, {{until: 0.9, {wrong}}}]"
        with pytest.raises(InputError, match=message):
            training.run(recipe(), ["steps=20", option])
    assert not (tmp_path / "run").exists()


def test_pictures_that_nobody_sees_are_told(own_data, tmp_path, capsys):
    path = tmp_path / "data.json"
    samples = json.loads(path.read_text())
    turns = [{"from": "human", "value": "What"}, {"from": "gpt", "value": "red"}]
    marked = [{"from": "human", "value": "<image>\nWhat"}, turns[1]]
    path.write_text(json.dumps([*samples, {"image": "good.png", "conversations": turns}, {"conversations": marked}]))
    assert training.run(own_data, ["epochs=1", "train={projector: 1e-3}"]) == 0
    err = capsys.readouterr().err
    assert f"{path}: 1 of 5 samples name a picture but have no <image>; it is not shown" in err
    assert f"{path}: 1 of 5 samples have <image> but name no picture; it is read as text" in err


@pytest.fixture
def own_data(recipe, tmp_path, pictures):
    """A recipe over a JSON file with a good picture, a broken one and no picture."""
    pictures[0].save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>\nWhat"}, {"from": "gpt", "value": "red"}]
    samples = [
        {"id": "one", "image": "good.png", "conversations": turns},
        {"id": "two", "image": "bad.png", "conversations": turns},
        {"id": "three", "conversations": [{**turns[0], "value": "What"}, turns[1]]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    scenes = BASE[BASE.index("data:") : BASE.index("train:")]
    text = BASE.replace(scenes, f"data: {{{{json: {tmp_path}/data.json, images: {tmp_path}}}}}\n")
    return recipe(text=text.replace("batch_size: 2", "batch_size: 1").replace("steps: 4", "epochs: 2"))


def test_own_data_with_a_broken_picture(own_data, capsys):
    assert training.run(own_data) == 0
    err = capsys.readouterr().err
    assert err.count("skipped sample 1 (id two): ") == 1 and "bad.png" in err
    assert "1 samples could not be used and were skipped" in err
    assert "instruction: 6 steps" in err


def test_two_processes_one_of_them_without_a_picture(own_data, tmp_path):
    """Text-only batches and the tower's unused norm must not stall the reduction of the gradients."""
    code = "import sys; from visualrwkv.training import run; sys.exit(run(sys.argv[1], sys.argv[2:]))"
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    options = ["train.vision=1e-3", "save_every=100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(training.__file__).parents[1])}
    done = subprocess.run(
        [*command, str(own_data), *options], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "instruction: 3 steps" in done.stderr and (tmp_path / "run" / "model.safetensors").is_file()


def test_questions_are_asked_while_training(recipe, tmp_path):
    training.run(recipe(), ["steps=2", "eval.every=2", "eval.pictures=2", "eval.objects=[1, 2]"])
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    result = next(entry["eval"] for entry in entries if "eval" in entry)
    assert "short" in result and "describe" in result and all(0 <= share <= 1 for share in result.values())


def test_training_without_accelerate_names_the_extra(recipe, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'visualrwkv\[train\]'"):
        training.run(recipe())


CONTRASTIVE = """
stage: contrastive
output: {output}
model:
  new:
    embed_dim: 32
    vision: {{image_size: 32, layers: 1, width: 64, head_width: 32, patch_size: 16}}
    text: {{context_length: 80, width: 32, heads: 2, layers: 1}}
    vocabulary: {model}
    image: {{mode: squash, image_mean: [0.5, 0.5, 0.5], image_std: [0.5, 0.5, 0.5]}}
data: {{scenes: {{objects: [1, 2], sides: [96, 110]}}}}
batch_size: 4
train: {{vision: 1.0e-3, text: 1.0e-3}}
steps: 3
workers: 0
save_every: 2
log_every: 1
eval: {{every: 3, pictures: 6}}
"""


def test_the_contrastive_stage_makes_a_tower_for_new_models(recipe, tmp_path):
    assert training.run(recipe("clip", CONTRASTIVE)) == 0
    folder = tmp_path / "clip"
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (measured,) = (entry["eval"] for entry in entries if "eval" in entry)
    among, objects = measured
    assert among.startswith("caption among ") and objects == "objects"
    text = BASE.replace(
        "{{from: {model}}}",
        "{{new: {{vision: " + str(folder) + ", vocabulary: {model}, projector: mlp, "
        "language: {{hidden_size: 64, num_hidden_layers: 2, head_size: 32, time_mix_rank: 8, decay_rank: 8}}}}}}",
    )
    model, processor = build_model(load_recipe(recipe("new", text)))
    tower = weights(folder)
    assert set(tower) == set(model.vit.state_dict())
    assert all(torch.equal(value, tower[name]) for name, value in model.vit.state_dict().items())
    assert processor.image_processor.mode == "squash" and processor.num_image_tokens == 5
    assert training.run(recipe("new", text), ["steps=1"]) == 0


def test_the_contrastive_stage_resumes_bitwise(recipe, tmp_path):
    options = ["eval.every=0", "save_every=1", "keep=5"]
    training.run(recipe("whole", CONTRASTIVE), options)
    training.run(recipe("parts", CONTRASTIVE), options)
    first = tmp_path / "parts" / "checkpoint-1"
    training.run(recipe("again", CONTRASTIVE), [*options, f"resume={first}"])
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "again"))


def test_a_batch_of_captions_has_no_caption_twice_and_each_with_its_patch(vlm):
    from visualrwkv.contrastive import PatchCaptions, collate_captions

    tokenizer, image_processor = vlm.processor.tokenizer, vlm.processor.image_processor
    scenes = ScenesData(objects=(2, 3), sides=(96, 110))
    dataset = PatchCaptions(scenes, tokenizer, image_processor, (4, 4), 200, 20)
    items = [dataset[i] for i in range(20)]
    assert torch.equal(items[3]["pixel_values"], dataset[3]["pixel_values"])
    batch = collate_captions(items)
    assert batch["pixel_values"].shape == (20, 3, 32, 32)
    rows = [tuple(row) for row in batch["texts"].tolist()]
    assert len(rows) == len(set(rows)) == len(batch["pictures"]) == len(batch["patches"])
    for picture, patch, row in zip(batch["pictures"].tolist(), batch["patches"].tolist(), rows, strict=True):
        assert (patch, row) in items[picture]["captions"]
        assert row.count(tokenizer.image_token_id) == 1 and max(row) == tokenizer.image_token_id
    assert {caption for item in items for _, caption in item["captions"]} == set(rows)
    with pytest.raises(InputError, match="context_length 4"):
        PatchCaptions(scenes, tokenizer, image_processor, (4, 4), 4, 20)[0]


def test_a_contrastive_model_learns_which_patch_shows_what():
    """The loss falls below what guessing gives, and nearest captions are found."""
    from visualrwkv.contrastive import ContrastiveModel, retrieval
    from visualrwkv.vision import describe_tower

    torch.manual_seed(0)
    tower = describe_tower({"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}, 16)
    text = {"context_length": 4, "vocab_size": 12, "width": 16, "heads": 2, "layers": 1}
    model = ContrastiveModel(16, tower, text)
    colours = torch.randn(8, 3)
    pictures = colours.view(2, 2, 2, 3).permute(0, 3, 1, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)
    captions = [(i + 1, 11, 0, 0) for i in range(8)]
    batch = (pictures, torch.arange(8) // 4, torch.arange(8) % 4, torch.tensor(captions))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(*batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # guessing among 8 costs 2.1
    items = [
        {"pixel_values": pictures[p], "captions": list(enumerate(captions[4 * p : 4 * p + 4])), "objects": 2}
        for p in (0, 1)
    ]
    assert retrieval(model, items, "cpu") == {"caption among 8": 1.0, "objects": 1.0}
    items[0]["captions"][0], items[0]["captions"][1] = (0, captions[1]), (1, captions[0])
    assert retrieval(model, items, "cpu") == {"caption among 8": 0.75, "objects": 0.5}
