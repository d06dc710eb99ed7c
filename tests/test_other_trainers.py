"""Training by what others wrote: a plain loop, transformers' Trainer on one process and two, peft."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import visualrwkv
from visualrwkv.errors import InputError
from visualrwkv.prompt import Turn

pytest.importorskip("accelerate")

ROOT = Path(__file__).parent.parent


def batch(vlm, picture):
    """One question with its reply, about a picture or about nothing."""
    turns = [Turn("user", "What", 0 if picture is None else 1), Turn("assistant", "red")]
    ids, labels = vlm.processor.encode_turns(turns)
    inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    if picture is not None:
        inputs["pixel_values"] = vlm.processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    return inputs


@pytest.fixture
def fresh(random_folder):
    """A model that may be changed."""
    return visualrwkv.load(random_folder, device="cpu")


def test_the_projector_alone_takes_batches_without_pictures(fresh, pictures):
    model = fresh.model.train()
    model.requires_grad_(False)
    model.proj.requires_grad_(True)
    optimizer = torch.optim.SGD(model.proj.parameters(), lr=0.1)
    losses = []
    for picture in (pictures[0], None, pictures[0], None):
        losses.append(model(**batch(fresh, picture)).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0] and losses[3] == losses[1]


class Samples(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_metrics_of_the_trainer_are_given_logits(fresh, pictures, tmp_path):
    from transformers import Trainer, TrainingArguments

    def compute(prediction):
        logits, labels = prediction
        hits = logits[:, :-1].argmax(-1) == labels[:, 1:]
        return {"right": hits[labels[:, 1:] >= 0].mean()}

    items = [batch(fresh, pictures[0])] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=3e-3, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        fresh.model, arguments, data_collator=lambda rows: rows[0], train_dataset=Samples(items),
        eval_dataset=Samples(items), compute_metrics=compute,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_right"] > before["eval_right"]
    assert np.isclose(after["eval_right"], 1)


TWO = """
import os, sys
sys.path.insert(0, sys.argv[1])
from PIL import Image
from test_other_trainers import Samples, batch
from transformers import Trainer, TrainingArguments
import visualrwkv

vlm = visualrwkv.load(sys.argv[2], device="cpu")
vlm.model.vit.requires_grad_(False)
picture = None if os.environ["RANK"] == "0" else Image.new("RGB", (32, 32), "red")
arguments = TrainingArguments(
    sys.argv[3], max_steps=2, per_device_train_batch_size=1, report_to=[], save_strategy="no", disable_tqdm=True,
    use_cpu=True, gradient_checkpointing=True, ddp_backend="gloo",
)
Trainer(
    vlm.model, arguments, data_collator=lambda rows: batch(vlm, picture), train_dataset=Samples([{}] * 8)
).train()
print("done", flush=True)
"""


def test_two_processes_of_the_trainer_one_of_them_without_a_picture(random_folder, tmp_path):
    """With checkpointing the Trainer does not look for parameters without a gradient, and would wait for ever."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(ROOT / "tests"), str(random_folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-2000:]


def test_lora_as_the_docs_say(fresh, pictures, tmp_path):
    pytest.importorskip("peft")
    (code,) = re.findall(r"```python\n(from peft.*?)```", (ROOT / "docs/training.md").read_text(encoding="utf-8"), re.S)
    begin, end = code.split("# ... train it, then\n")
    names = {}
    exec(begin, names)  # as it stands there
    assert any(".proj.3.lora_" in name for name, _ in names["model"].named_parameters())
    del names
    names = {}
    linear = begin.replace(r"proj\.[13]", "proj").replace("visualrwkv.load()", "fresh")
    exec(linear.replace("import visualrwkv\n", ""), {"fresh": fresh}, names)
    model = names["model"].train()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning and all("lora_" in name and ".vit." not in name for name in learning)
    assert any(".proj.lora_" in name for name in learning) and any(".att.receptance.lora_" in name for name in learning)
    inputs = batch(fresh, pictures[0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(**inputs).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="adapter: holds a peft adapter alone; merge it"):
        visualrwkv.load(tmp_path / "adapter")
    model.eval()
    with torch.no_grad():
        wanted = model(**inputs).logits
    exec(end.replace("out/lora", str(tmp_path / "merged")), names | {"vlm": fresh})
    merged = visualrwkv.load(tmp_path / "merged", device="cpu").model
    with torch.no_grad():
        assert (merged(**inputs).logits - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_a_state_to_begin_with_learns(fresh, pictures):
    model, inputs = fresh.model.train(), batch(fresh, pictures[0])
    model.requires_grad_(False)
    with torch.no_grad():
        state = model(torch.tensor([[1]]), use_cache=True).cache
    tensors = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in state.tensors().items()}
    optimizer = torch.optim.Adam(tensors.values(), lr=0.1)
    two = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    losses = []
    for _ in range(4):
        begin = visualrwkv.RWKVState.from_tensors(tensors, seen=0)
        losses.append(model(**two, cache=begin.repeat(2)).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match=r"of 1 sequences in 3 layers, the batch of 2 in 3; `state.repeat\(n\)`"):
        model(**two, cache=visualrwkv.RWKVState.from_tensors(tensors, seen=0))
    begin.layers = begin.layers[:2]
    with pytest.raises(InputError, match="of 1 sequences in 2 layers, the batch of 1 in 3"):
        model(**inputs, cache=begin)
