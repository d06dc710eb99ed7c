"""What the tests of training share."""

import torch
from safetensors.torch import load_file

BASE = """
stage: instruction
output: {output}
model: {{from: {model}}}
data: {{max_length: 600, scenes: {{seed: 1, objects: [1, 2], sides: [96, 110], turns: [1, 2]}}}}
train: {{projector: 1.0e-3, language: 1.0e-3}}
steps: 4
batch_size: 2
workers: 0
log_every: 1
save_every: 2
"""


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}
