"""The language models against recorded numbers, and the ways of reading that must agree with each other."""

import pytest
import torch
from golden_data import error, golden_file, tensors

from visualrwkv import RWKVState
from visualrwkv.checkpoints import load_language_model
from visualrwkv.configuration import VisualRWKVTextConfig
from visualrwkv.errors import InputError
from visualrwkv.rwkv import RWKV

TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=["rwkv6_lm", "rwkv5_lm"])
def golden(request):
    """Name, model in float32 and recorded input and output."""
    config, weights = load_language_model(golden_file(f"{request.param}.pth"))
    model = RWKV(config)
    model.load_state_dict(weights)
    return request.param, model.float().eval().requires_grad_(False), tensors(f"{request.param}_io")


def test_logits_and_block_outputs_equal_the_recorded_ones(golden):
    _, model, io = golden
    outputs = []
    hooks = [block.register_forward_hook(lambda m, i, out: outputs.append(out[0])) for block in model.blocks]
    hidden, _ = model(model.emb(io["input_ids"]))
    for hook in hooks:
        hook.remove()
    for i, output in enumerate(outputs):
        assert error(output, io[f"block_out.{i}"]) < TOLERANCE, f"block {i}"
    assert error(model.head(hidden), io["logits"]) < TOLERANCE


def test_token_by_token_equals_the_recorded_logits(golden):
    _, model, io = golden
    state, logits = None, []
    for column in io["input_ids"].split(1, dim=1):
        hidden, state = model(model.emb(column), state)
        logits.append(model.head(hidden))
    assert error(torch.cat(logits, 1), io["logits"]) < TOLERANCE
    assert state.seen == io["input_ids"].shape[1]


def test_state_equals_the_recorded_one(golden):
    name, model, io = golden
    if name == "rwkv5_lm":
        pytest.skip("no state was recorded for RWKV-5")
    state = model(model.emb(io["input_ids"][:1]))[1]
    for key, value in tensors("rwkv6_lm_state").items():
        field, layer = key.split(".")
        assert error(getattr(state.layers[int(layer)], field)[0], value) < TOLERANCE, key


@pytest.mark.parametrize("cut", [1, 17, 49])
def test_two_pieces_equal_one(golden, cut):
    _, model, io = golden
    embeds = model.emb(io["input_ids"])
    cut = min(cut, embeds.shape[1] - 1)
    whole, state = model(embeds)
    first, carried = model(embeds[:, :cut])
    second, carried = model(embeds[:, cut:], carried)
    assert error(torch.cat([first, second], 1), whole) < 1e-4
    for ours, expected in zip(carried.layers, state.layers, strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert error(a, b) < 1e-4


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_changes_nothing_wherever_it_stands(golden, side):
    """The public code reads token 0 at the left; here a padded position leaves every state as it was."""
    _, model, io = golden
    ids = io["input_ids"][:1]
    length, pad = ids.shape[1], 7
    places = {
        "left": torch.arange(length) + pad,
        "right": torch.arange(length),
        "inside": torch.cat([torch.arange(20), torch.arange(20, length) + pad]),
    }[side]
    padded = torch.full((1, length + pad), 3)
    padded[:, places] = ids
    mask = torch.zeros(1, length + pad, dtype=torch.bool)
    mask[:, places] = True
    alone, state = model(model.emb(ids))
    hidden, padded_state = model(model.emb(padded), mask=mask)
    assert error(hidden[:, places], alone) < 1e-4
    for ours, expected in zip(padded_state.layers, state.layers, strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert error(a, b) < 1e-4


def test_padding_gives_no_gradient_and_no_nan(golden):
    _, model, io = golden
    ids = io["input_ids"][:1]

    def gradients(ids, mask):
        embeds = model.emb(ids).requires_grad_(True)
        model(embeds, mask=mask)[0][:, -ids.shape[1] + (mask is not None) * 5 :].square().sum().backward()
        return embeds.grad

    alone = gradients(ids, None)
    mask = torch.ones(1, ids.shape[1] + 5, dtype=torch.bool)
    mask[:, :5] = False
    padded = gradients(torch.nn.functional.pad(ids, (5, 0)), mask)
    assert padded[:, :5].abs().max() == 0
    assert error(padded[:, 5:], alone) < 1e-4 * alone.abs().max().item()


def test_state_selects_repeats_clones_and_saves(golden):
    _, model, io = golden
    state = model(model.emb(io["input_ids"]))[1]
    swapped = state.select([1, 0, 1])
    assert swapped.batch_size == 3
    assert torch.equal(swapped.layers[0].wkv[2], state.layers[0].wkv[1])
    doubled = state.repeat(2)
    assert torch.equal(doubled.layers[1].att_shift[1], state.layers[1].att_shift[0])
    kept = state.clone()
    model(model.emb(io["input_ids"]), state)
    assert not torch.equal(kept.layers[0].wkv, state.layers[0].wkv)
    back = RWKVState.from_tensors(kept.tensors(), kept.seen)
    for ours, expected in zip(back.layers, kept.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    config = model.config
    assert kept.nbytes == 2 * 4 * config.state_size  # two sequences, float32


def test_state_size_is_the_papers():
    config = VisualRWKVTextConfig(hidden_size=2048, num_hidden_layers=24)
    assert config.state_size == 66 * 2048 * 24


def test_config_refuses_sizes_that_do_not_fit():
    with pytest.raises(InputError, match="100 is not a multiple of head_size 64"):
        VisualRWKVTextConfig(hidden_size=100)
    with pytest.raises(InputError, match="RWKV-5 and RWKV-6"):
        VisualRWKVTextConfig(version=7)


@pytest.mark.parametrize("version", [5, 6])
def test_fresh_model_can_learn(version):
    """Starting values are finite, and a few steps of plain gradient descent lower the loss."""
    config = VisualRWKVTextConfig(
        version=version, vocab_size=32, hidden_size=64, num_hidden_layers=2, time_mix_rank=4, decay_rank=4
    )
    model = RWKV(config)
    model.init_weights()
    ids = torch.randint(32, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        logits = model.head(model(model.emb(ids))[0])
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
