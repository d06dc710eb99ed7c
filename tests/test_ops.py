"""The WKV operator: golden numbers of the published model, float64 gradients, extreme decays, states, precisions.

All forms go through the same tests here; what only a compiled form has is in test_kernel.py and test_cuda.py.
"""

import os
import shutil
import sys
from functools import partial

import pytest
import torch
from golden_data import GOLDEN
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from visualrwkv.ops import wkv6, wkv6_chunked, wkv6_kernel, wkv6_reference
from visualrwkv.ops.reference import wkv6_step

COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
needs_kernel = pytest.mark.skipif(not COMPILER or sys.platform == "win32", reason="needs a C++ compiler")
KERNEL = pytest.param(wkv6_kernel, marks=needs_kernel)
FORMS = pytest.mark.parametrize("form", [wkv6_reference, wkv6_chunked, KERNEL])

NAMES = ["y", "state", "r", "k", "v", "w", "u", "s0"]  # of what `gradients` returns
# (mean, spread) of w: initial values, trained values, strong, very strong, everything between none and complete decay
DECAYS = [(-3.5, 1.5), (-2.0, 1.5), (0.0, 1.5), (2.0, 1.5), (-4.0, 8.0), (20.0, 0.0), (200.0, 0.0), (-300.0, 0.0)]


def sample(batch, time, heads, size=64, mean=-2.0, spread=1.5, dtype=torch.float32, seed=0):
    """r, k, v, w, u, state; w ~ N(mean, spread)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, time, heads, size)
    r, k, v, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    u = torch.randn(heads, size, generator=generator, dtype=torch.float64)
    state = torch.randn(batch, heads, size, size, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (r, k, v, w * spread + mean, u, state)]


def mix_decays(w, complete=200.0, none=-torch.inf):
    """Put channels of strong and of no decay side by side, and some that jump from token to token."""
    w[..., ::4] = 3.0
    w[..., 1::4] = -12.0
    w[:, ::3, :, 2::4] = complete
    w[:, 1::3, :, 2::4] = none


def gradients(form, inputs, gy, gs=None):
    """y, the final state and the gradients of sum(y gy) + sum(state gs) for every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y, state = form(*inputs)
    loss = (y * gy).sum() if gs is None else (y * gy).sum() + (state * gs).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, inputs)]


def in_double(form, inputs, gy, gs):
    return gradients(form, [x.double() for x in inputs], gy.double(), gs.double())


def error(value, exact):
    """Largest difference, relative to the largest exact entry."""
    difference = (value.double() - exact.double()).abs().max()
    return float(difference / exact.double().abs().max().clamp(min=1e-30))


def compare(results, exact, limit, **limits):
    """The error of every result is below `limit`, or below the one that its name has in `limits`."""
    for name, value, wanted in zip(NAMES[: len(exact)], results, exact, strict=True):
        assert error(value, wanted) < limits.get(name, limit), name


def check(form, inputs, limit, exact=wkv6_reference, **limits):
    """`compare` a form's outputs and gradients with those of the form `exact` in float64."""
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    compare(gradients(form, inputs, gy, gs), in_double(exact, inputs, gy, gs), limit, **limits)


def check_low_precision(run, inputs, floor, **floors):
    """The results of `run(inputs, gy, gs)` have at most twice the error of the naive recurrence, or one up to `floor`.

    The naive recurrence reads 16 bits and computes in float32: all of its error comes from rounding the results.
    """
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    results, naive = run(inputs, gy, gs), gradients(wkv6_reference, inputs, gy, gs)
    assert [x.dtype for x in results] == [inputs[0].dtype, torch.float32, *(x.dtype for x in inputs)]
    exact = in_double(wkv6_reference, inputs, gy, gs)
    for name, value, rough, wanted in zip(NAMES, results, naive, exact, strict=True):
        assert error(value, wanted) <= max(2 * error(rough, wanted), floors.get(name, floor)), name


def check_rounding(form, shape):
    """With one channel of ones and a state that forgets everything, y is this token's v plus the last one's."""
    for dtype in (torch.float16, torch.bfloat16):
        v = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        v = torch.where(v.isfinite(), v, 0).view(shape)
        one = torch.zeros_like(v)
        one[..., 0] = 1
        y, _ = form(one, one, v, torch.full_like(v, torch.inf), one[0, 0])
        exact = v.float()
        exact[:, 1:] += v.float()[:, :-1]
        assert torch.equal(y, exact.to(dtype))


def same_bits(results, wanted):
    return all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


def golden(name):
    """The tensors of a golden file in float32, those of shape (B, T, C) as (B, T, H, N)."""
    tensors = {key: x.float() for key, x in load_file(GOLDEN / name).items()}
    heads, size = tensors["u"].shape
    return {key: x.unflatten(-1, (heads, size)) if x.dim() == 3 else x for key, x in tensors.items()}


def check_golden(data, suffix, results, gw=2e-6):
    """gw: the limit for the gradient of w, which the CUDA kernels find as a difference of sums."""
    names = ["y", "s_out", "gr", "gk", "gv", "gw", "gu", *(["gs0"] if suffix else [])]
    for name, value in zip(names, results, strict=True):
        expected = data[name if name == "gs0" else name + suffix]
        assert error(value, expected) < (gw if name == "gw" else 2e-6), name


@FORMS
@pytest.mark.parametrize("name", ["wkv6_a", "wkv6_b", "wkv6_extreme"])
def test_golden_rwkv6(form, name):
    data = golden(f"{name}.safetensors")
    check_golden(data, "", gradients(form, [data[key] for key in "rkvwu"], data["gy"]))


@FORMS
@pytest.mark.parametrize("name", ["wkv6_state", "wkv6_state_gs"])
def test_golden_rwkv6_from_a_state(form, name):
    data = golden(f"{name}.safetensors")
    inputs = [data[key] for key in ("r", "k", "v", "w", "u", "s0")]
    check_golden(data, "__s0", gradients(form, inputs, data["gy"], data.get("gs_out")))


@FORMS
@pytest.mark.parametrize("suffix", ["", "__s0"])
def test_golden_rwkv5_is_the_case_of_constant_decay(form, suffix):
    data = golden("wkv5.safetensors")
    inputs = [data[key] for key in "rkvwu"] + ([data["s0"]] if suffix else [])

    def constant_decay(r, k, v, w, u, state=None):
        return form(r, k, v, w.expand_as(r), u, state)

    check_golden(data, suffix, gradients(constant_decay, inputs, data["gy"]))


@pytest.mark.parametrize("form", [wkv6, wkv6_chunked, wkv6_reference, KERNEL])
@pytest.mark.parametrize(("time", "mean"), [(1, -1.0), (5, -1.0), (17, -1.0), (17, 0.0), (17, 3.0), (33, -1.0)])
def test_gradcheck(form, time, mean):
    if form is wkv6_reference and time > 5:
        pytest.skip("autograd of the recurrence; the short cases suffice")
    inputs = [x.requires_grad_() for x in sample(1, time, 2, 3, mean=mean, dtype=torch.float64)]
    assert torch.autograd.gradcheck(form, inputs, fast_mode=time > 5)


@pytest.mark.parametrize("mean", [0.0, 3.0, 5.0])
def test_gradcheck_strong_decay(mean):
    inputs = [x.requires_grad_() for x in sample(1, 19, 1, 4, mean=mean, dtype=torch.float64)]
    assert torch.autograd.gradcheck(wkv6_chunked, inputs)


@pytest.mark.parametrize(
    ("form", "double", "limits"),
    [
        (wkv6_chunked, 1e-13, {"w": 5e-6}),
        pytest.param(wkv6_kernel, 1e-14, {"y": 5e-7, "state": 5e-7}, marks=needs_kernel),
    ],
)
@pytest.mark.parametrize(("mean", "spread"), DECAYS)
def test_exact_at_every_decay(form, double, limits, mean, spread):
    inputs = sample(2, 75, 2, mean=mean, spread=spread)
    check(form, inputs, 1e-6, **limits)
    check(form, [x.double() for x in inputs], double)


@pytest.mark.parametrize(
    ("form", "complete", "none", "limit"),
    [(wkv6_chunked, 3.0, -12.0, 5e-6), pytest.param(wkv6_kernel, 200.0, -torch.inf, 1e-6, marks=needs_kernel)],
)
def test_channels_of_every_decay_side_by_side(form, complete, none, limit):
    inputs = sample(1, 64, 2)
    mix_decays(inputs[3], complete, none)
    check(form, inputs, limit)


@pytest.mark.parametrize("form", [wkv6, KERNEL])
@pytest.mark.parametrize("cuts", [(1,), (16,), (7, 16, 17, 50), (1, 2, 7, 16, 33, 50), tuple(range(1, 21))])
@pytest.mark.parametrize("mean", [-2.0, 2.0])
def test_split_sequence_equals_the_whole(form, cuts, mean):
    r, k, v, w, u, state = sample(2, 53, 2, mean=mean)
    whole, final = form(r, k, v, w, u, state)
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, 53), strict=True):
        y, state = form(*(x[:, start:end] for x in (r, k, v, w)), u, state)
        pieces.append(y)
    assert error(torch.cat(pieces, 1), whole) < 1e-6
    assert error(state, final) < 1e-6


@pytest.mark.parametrize("form", [wkv6, KERNEL])
@pytest.mark.parametrize("time", [1, 5, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_padding_leaves_the_state_untouched(form, time, dtype):
    r, k, v, w, u, state = sample(2, time, 2, dtype=dtype)
    state = state if dtype == torch.float64 else state.float()
    inputs = [x.requires_grad_() for x in (r, torch.zeros_like(k), v, torch.full_like(w, -torch.inf), u, state)]
    y, final = form(*inputs)
    assert torch.equal(final, state)
    gs = torch.randn_like(state)
    (through,) = torch.autograd.grad((final * gs).sum(), state, retain_graph=True)
    assert torch.equal(through, gs)
    results = torch.autograd.grad((final * gs).sum() + y.sum(), inputs)
    assert all(x.isfinite().all() for x in results)
    assert not results[3].any(), "the gradient of w at -inf is 0"


def test_step_equals_the_recurrence():
    inputs = sample(3, 1, 2, mean=1.0)
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    compare(gradients(wkv6_step, inputs, gy, gs), gradients(wkv6_reference, inputs, gy, gs), 1e-6)
    compare(wkv6_step(*inputs[:5]), wkv6_reference(*inputs[:5]), 1e-6)


@pytest.mark.parametrize("pad", [3, 16, 21])
def test_left_padded_equals_unpadded(pad):
    r, k, v, w, u, _ = sample(1, 40, 2, mean=1.0)
    gy, gs = torch.randn(1, 40, 2, 64), torch.randn(1, 2, 64, 64)
    alone = gradients(wkv6_chunked, [r, k, v, w, u], gy, gs)

    def padded(r, k, v, w, u):
        def front(x, value):
            return torch.cat([torch.full_like(x[:, :1], value).expand(-1, pad, -1, -1), x], 1)

        y, state = wkv6_chunked(front(r, 1.7), front(k, 0.0), front(v, -2.3), front(w, -torch.inf), u)
        return y[:, pad:], state

    compare(gradients(padded, [r, k, v, w, u], gy, gs), alone, 3e-6)


@pytest.mark.parametrize("form", [wkv6_chunked, KERNEL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_naive_recurrence(form, dtype):
    inputs = sample(2, 50, 2, mean=-3.0, dtype=dtype)
    inputs[5] = inputs[5].float()
    check_low_precision(partial(gradients, form), inputs, 1e-6)


@pytest.mark.parametrize("time", [1, 20])
def test_autocast_changes_nothing(time):
    inputs = sample(1, time, 2)
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    plain = gradients(wkv6, inputs, gy, gs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(gradients(wkv6, inputs, gy, gs), plain)


def test_gradient_checkpointing():
    inputs = sample(1, 40, 2)
    gy = torch.randn_like(inputs[0])

    def checkpointed(*tensors):
        return checkpoint(wkv6_chunked, *tensors, use_reentrant=False)

    assert same_bits(gradients(checkpointed, inputs, gy), gradients(wkv6_chunked, inputs, gy))


@pytest.mark.parametrize("form", [wkv6_chunked, KERNEL])
def test_only_some_gradients_wanted(form):
    r, k, v, w, u, state = sample(1, 20, 2)
    k.requires_grad_()
    y, final = form(r, k, v, w, u)
    (from_y,) = torch.autograd.grad(y.sum(), k, retain_graph=True)
    (from_state,) = torch.autograd.grad(final.sum(), k, retain_graph=True)
    (both,) = torch.autograd.grad(y.sum() + final.sum(), k)
    assert error(from_y + from_state, both) < 1e-6
    state.requires_grad_()
    y, _ = form(r, k.detach(), v, w, u, state)
    assert torch.autograd.grad(y.sum(), state)[0].shape == state.shape
    with torch.no_grad():
        assert not form(r, k, v, w, u, state)[0].requires_grad


@pytest.mark.parametrize("form", [wkv6_chunked, KERNEL])
def test_a_second_derivative_is_refused(form):
    """It would be missing without a word."""
    inputs = [x.requires_grad_() for x in sample(1, 20, 2)]
    y, _ = form(*inputs)
    first = torch.autograd.grad(y.square().sum(), inputs[:5], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(x.square().sum() for x in first).backward()


@pytest.mark.parametrize("form", [wkv6_chunked, KERNEL])
def test_strided_and_mixed_arguments(form):
    r, k, v, w, u, state = sample(2, 40, 2)
    joint = torch.stack([r, k, v], 2).transpose(0, 1)  # (T, B, 3, H, N)
    views = [joint[:, :, i].transpose(0, 1) for i in range(3)]
    odd = torch.stack([state, state], -1)[..., 0]
    assert not views[0].is_contiguous() and not odd.is_contiguous()
    expanded, whole = w[:, :1].expand_as(w), w[:, :1].repeat(1, 40, 1, 1)
    assert same_bits(form(*views, expanded, u), form(r, k, v, whole, u))
    assert same_bits(form(*views, expanded, u, odd), form(r, k, v, whole, u, state))
    last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (r, k, v, w)]
    assert same_bits(form(*last, u, state), form(r, k, v, w, u, state))
    mixed = [r.bfloat16(), k.half(), v, w, u.bfloat16(), state]
    exact = wkv6_reference(*(x.double() for x in mixed))
    y, final = form(*mixed)
    assert y.dtype == torch.bfloat16 and error(y, exact[0]) < 5e-3 and error(final, exact[1]) < 1e-6


def test_arguments_are_left_alone():
    inputs = sample(1, 20, 1)
    copies = [x.clone() for x in inputs]
    gradients(wkv6_chunked, inputs, torch.ones_like(inputs[0]))
    wkv6_chunked(*inputs)
    assert same_bits(inputs, copies)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 3, 128), r"r must have shape \(batch, time, heads, head_size\), got \(2, 3, 128\)"),
        (0, (2, 0, 2, 64), r"r has shape|k has shape \(2, 3, 2, 64\) but r has shape \(2, 0, 2, 64\)"),
        (1, (2, 4, 2, 64), r"k has shape \(2, 4, 2, 64\) but r has shape \(2, 3, 2, 64\)"),
        (3, (2, 64), r"w has shape \(2, 64\) but r has shape \(2, 3, 2, 64\)"),
        (4, (128,), r"u has shape \(128,\) but r of shape \(2, 3, 2, 64\) needs \(2, 64\)"),
        (5, (2, 2, 64), r"state has shape \(2, 2, 64\) .* needs \(2, 2, 64, 64\)"),
    ],
)
@pytest.mark.parametrize("form", [wkv6, wkv6_chunked, wkv6_reference])
def test_wrong_shapes_are_named(form, position, shape, message):
    inputs = sample(2, 3, 2)
    inputs[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        form(*inputs)


def test_wrong_dtypes_and_empty_sequences_are_named():
    inputs = sample(1, 3, 1)
    with pytest.raises(ValueError, match="k has dtype torch.int64"):
        wkv6(inputs[0], inputs[1].long(), *inputs[2:])
    with pytest.raises(ValueError, match="a step takes one token, not 3"):
        wkv6_step(*inputs)
    with pytest.raises(ValueError, match="at least one time step"):
        wkv6(*(x[:, :0] for x in inputs[:4]), *inputs[4:])


def test_no_sequence_gives_no_result():
    for form in (wkv6, wkv6_chunked, wkv6_reference):
        inputs = [x[:0] if x.dim() > 2 else x for x in sample(1, 20, 2)]
        y, state = form(*inputs)
        assert y.shape == (0, 20, 2, 64) and state.shape == (0, 2, 64, 64)
