"""Prompts in one compiled call against the PyTorch modules."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from golden_data import error
from test_decoding import language_model, needs_kernel, prefix

import visualrwkv
from visualrwkv import RWKVState, inference
from visualrwkv.ops import use_kernel
from visualrwkv.ops.int8 import quantize_linears
from visualrwkv.scan import layer_orders


def ragged(batch, length):
    """(B, T) bool: padded left, right, in the middle, or not at all."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        kind = row % 4
        if kind == 0:
            mask[row, : length // 3] = False
        elif kind == 1:
            mask[row, length - length // 4 :] = False
        elif kind == 2:
            mask[row, length // 2 : length // 2 + 2] = False
    return mask


def orders_of(model, scan, batch, length):
    """An image of 2 x 3 patches at another place of each row."""
    starts = torch.tensor([[row, (1 + row) % (length - 6)] for row in range(batch)])
    return layer_orders(scan, len(model.blocks), starts, (2, 3), (batch, length))


def both_ways(model, ids, state, **options):
    """(hidden, state) of the kernel and of the modules."""
    results = []
    for kernel in (True, False):
        with torch.no_grad(), use_kernel(kernel):
            results.append(model(model.emb(ids), state.clone(), **options))
    return results


def assert_equal(ours, wanted, dtype, real=None):
    """Within the precision of the modules; padded positions of hidden mean nothing."""
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    (hidden, after), (expected, state) = ours, wanted
    assert hidden.shape == expected.shape and hidden.dtype == expected.dtype
    if real is not None:
        hidden, expected = hidden[real], expected[real]
    assert error(hidden.float(), expected.float()) <= tolerance * expected.float().abs().max()
    assert after.seen == state.seen
    for a, b in zip(after.layers, state.layers, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous()
            assert error(x.float(), y.float()) <= tolerance * max(1.0, y.float().abs().max().item())


@needs_kernel
@pytest.mark.parametrize(
    ("head_size", "hidden", "inner"), [(64, 128, None), (32, 192, 640), (40, 120, 100), (30, 90, 70)]
)
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (1, 45), (5, 13), (20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_equals_the_modules(head_size, hidden, inner, batch, length, dtype, padded):
    model = language_model(head_size, hidden, inner, dtype=dtype)
    state, ids = prefix(model, batch), torch.randint(50, (batch, length))
    mask = ragged(batch, length) if padded else None
    ours, wanted = both_ways(model, ids, state, mask=mask)
    assert_equal(ours, wanted, dtype, mask)


@needs_kernel
@pytest.mark.parametrize("scan", ["uni", "bi", "multi"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 3, 99])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_orders_padding_and_what_is_kept(scan, padded, keep, threads):
    model, batch, length = language_model(), 5, 16
    state, ids = prefix(model, batch), torch.randint(50, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.bool)
    if padded:
        mask[1::2, :3] = False  # where no image lies, as prompts of different lengths have it
    starts = torch.tensor([[row, 4 + 2 * (row % 4)] for row in range(batch)])  # the last one ends with its sequence
    orders = layer_orders(scan, len(model.blocks), starts, (2, 3), (batch, length))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours, wanted = both_ways(model, ids, state, mask=mask, orders=orders, keep=keep)
    finally:
        torch.set_num_threads(before)
    assert_equal(ours, wanted, torch.float32, mask[:, -keep:])
    assert ours[0].shape[1] == (min(keep, length) if keep else length)


@needs_kernel
def test_it_is_the_kernel_that_was_compared():
    model = language_model()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 8:] = False
    with torch.no_grad():
        embeds = model.emb(torch.randint(50, (2, 9)))
        state = prefix(model, 2)
        orders = orders_of(model, "multi", 2, 9)
        hidden = inference.read(model, embeds, state, mask, orders, keep=2)
        assert hidden.shape == (2, 2, 128) and state.seen == 5  # `forward` counts
        mask[0, 1] = False
        assert inference.read(model, embeds, state, mask, orders) is None, "no image is padded inside"


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length"), [(1, 50), (2, 50), (7, 50), (40, 50), (6, 1100)])
@pytest.mark.parametrize("threads", [1, 2, 3, 6])
def test_batches_of_unequal_sequences(batch, length, dtype, threads):
    """Shared by rows, or by sequences in several pieces; some of nothing at all."""
    model, before = language_model(dtype=dtype), torch.get_num_threads()
    mask = torch.arange(length) >= torch.randint(50, (batch, 1))
    mask[3::4] = False
    ids, state = torch.randint(50, (batch, length)), prefix(model, batch)
    starts = torch.stack([torch.arange(batch), torch.full((batch,), length - 7)], 1)[mask[:, -7]]
    orders = layer_orders("bi", len(model.blocks), starts, (2, 3), (batch, length))
    try:
        torch.set_num_threads(threads)
        for keep in (0, 1):
            ours, wanted = both_ways(model, ids, state, mask=mask, orders=orders, keep=keep)
            assert_equal(ours, wanted, dtype, mask[:, -keep:])
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_bfloat16_is_nearer_to_the_exact_result_than_the_modules_are():
    model, ids = language_model(dtype=torch.bfloat16), torch.randint(50, (3, 40))
    state = RWKVState.zeros(model.config, 3, dtype=torch.bfloat16)
    (ours, _), (rough, _) = both_ways(model, ids, state)
    exact = language_model(dtype=torch.bfloat16).double()
    with torch.no_grad():
        wanted, _ = exact(exact.emb(ids))
    assert (ours - wanted).square().mean() <= (rough - wanted).square().mean()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_with_eight_bits(dtype):
    model = language_model(dtype=dtype)
    quantize_linears(model.blocks)
    ids = torch.randint(50, (2, 20))
    assert_equal(*both_ways(model, ids, prefix(model, 2), keep=2), dtype)


@needs_kernel
def test_a_prompt_is_its_tokens_one_by_one():
    model, ids = language_model(), torch.randint(50, (2, 17))
    with torch.no_grad():
        hidden, state = model(model.emb(ids))
        one = RWKVState.zeros(model.config, 2)
        alone = [model(model.emb(column), one)[0] for column in ids.split(1, 1)]
    assert error(torch.cat(alone, 1), hidden) < 1e-4
    for a, b in zip(one.layers, state.layers, strict=True):
        assert all(error(x, y) < 1e-4 for x, y in zip(a, b, strict=True))


@needs_kernel
def test_the_given_state_and_embeddings_are_not_written_to():
    model = language_model()
    state, embeds = prefix(model, 2), torch.randn(2, 9, 128)
    layers, copies, copy = list(state.layers), state.clone().layers, embeds.clone()
    with torch.no_grad():
        model(embeds, state)
    assert torch.equal(embeds, copy) and state.layers[0] is not layers[0]
    for layer, former in zip(layers, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, former, strict=True))


@needs_kernel
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_results_repeat_bit_by_bit_in_any_thread(guard):
    model, ids, results = language_model(), torch.randint(50, (3, 30)), []

    def read():
        with guard():
            results.append(model(model.emb(ids), keep=1)[0])

    read()
    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(results) == 4 and all(torch.equal(results[0], other) for other in results)
    assert results[0].is_inference() == (guard is torch.inference_mode)


@needs_kernel
@pytest.mark.parametrize("change", [{"sources": 9}, {"sources": -1}, {"real": torch.ones(2, 8, dtype=torch.bool)}])
def test_positions_that_do_not_fit_are_refused(change):
    model, state = language_model(), None
    embeds = torch.randn(2, 9, 128)
    with torch.no_grad():
        model(embeds)  # there is a plan now
    plan, state = inference._plans[model], prefix(model, 2)
    sources = [None] * 4
    if "sources" in change:
        sources[1] = torch.full((2, 9), change["sources"])
    memory = [tensor for layer in state.layers for tensor in layer]
    sizes = (plan.heads, plan.norm_eps, plan.head_eps)
    with torch.no_grad(), pytest.raises(ValueError, match="positions|outside"):
        torch.ops.visualrwkv.rwkv6_prefill(embeds, plan.weights(), [], memory, change.get("real"), sources, 0, *sizes)


@needs_kernel
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_prefill import assert_equal, both_ways, language_model, prefix, ragged
for hidden, head_size, inner in ((128, 64, None), (90, 30, 70), (640, 64, 900)):
    for dtype in (torch.float32, torch.bfloat16):
        model = language_model(head_size, hidden, inner, dtype=dtype)
        for mask in (None, ragged(3, 13)):
            ids, state = torch.randint(50, (3, 13)), prefix(model, 3)
            assert_equal(*both_ways(model, ids, state, mask=mask), dtype, mask)
"""
    path = os.pathsep.join([str(Path(visualrwkv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    call = [sys.executable, "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
