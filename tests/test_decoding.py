"""The compiled step of decoding against the PyTorch modules, weights of eight bits, prompts read in pieces."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_random_model
from golden_data import error, golden_file, tensors
from torch import nn

import visualrwkv
from visualrwkv import InputError, RWKVState, inference
from visualrwkv.checkpoints import load_language_model
from visualrwkv.configuration import VisualRWKVTextConfig
from visualrwkv.ops import build, use_kernel
from visualrwkv.ops.int8 import Int8Linear, quantize_linears, quantize_rows
from visualrwkv.rwkv import RWKV
from visualrwkv.scan import pieces

COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
needs_kernel = pytest.mark.skipif(not COMPILER or sys.platform == "win32", reason="needs a C++ compiler")


def language_model(head_size=64, hidden=128, inner=None, version=6, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = VisualRWKVTextConfig(
        version=version,
        vocab_size=50,
        hidden_size=hidden,
        num_hidden_layers=3,
        head_size=head_size,
        intermediate_size=inner,
        time_mix_rank=8,
        decay_rank=8,
    )
    model = RWKV(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def prefix(model, batch=1):
    with torch.no_grad(), use_kernel(False):
        return model(model.emb(torch.randint(50, (batch, 5))))[1]


def steps(model, state, kernel, tokens):
    """Logits (B, T, V) of the tokens, one call each, and the state."""
    logits = []
    with torch.no_grad(), use_kernel(kernel):
        for column in tokens.split(1, 1):
            hidden, state = model(model.emb(column), state)
            logits.append(model.logits(hidden))
    return torch.cat(logits, 1).float(), state


def was_taken(model, batch=1):
    embeds = model.emb(torch.randint(50, (batch, 1))).detach()
    with torch.no_grad():
        return inference.read(model, embeds, RWKVState.zeros(model.config, batch, dtype=embeds.dtype)) is not None


@needs_kernel
@pytest.mark.parametrize(("head_size", "hidden", "inner"), [(64, 128, None), (32, 192, 640), (40, 120, 100)])
@pytest.mark.parametrize("batch", [1, 2, 7, 16, 19, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_equals_the_modules(head_size, hidden, inner, batch, dtype):
    model = language_model(head_size, hidden, inner, dtype=dtype)
    state, tokens = prefix(model, batch), torch.randint(50, (batch, 4))
    kept = state.clone()
    assert was_taken(model, batch)
    ours, after = steps(model, state.clone(), True, tokens)
    wanted, expected = steps(model, state, False, tokens)
    tolerance = 3e-6 if dtype == torch.float32 else 0.03  # bfloat16: the modules round after every operation
    assert error(ours, wanted) <= tolerance * wanted.abs().max()
    assert after.seen == expected.seen == kept.seen + 4
    for a, b in zip(after.layers, expected.layers, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert error(x.float(), y.float()) <= tolerance * max(1.0, y.float().abs().max().item())


@needs_kernel
def test_bfloat16_step_is_nearer_to_the_exact_one_than_the_modules_are():
    model = language_model(dtype=torch.bfloat16)
    tokens, state = torch.randint(50, (2, 6)), prefix(model, 2)
    exact, _ = steps(
        language_model(dtype=torch.bfloat16).double(),
        RWKVState([type(layer)(*(x.double() for x in layer)) for layer in state.layers], state.seen),
        False,
        tokens,
    )
    ours, rough = steps(model, state.clone(), True, tokens)[0], steps(model, state.clone(), False, tokens)[0]
    assert error(ours, exact) <= error(rough, exact)


@needs_kernel
def test_golden_logits_token_by_token():
    config, weights = load_language_model(golden_file("rwkv6_lm.pth"))
    model = RWKV(config)
    model.load_state_dict(weights)
    model.float().eval()
    io = tensors("rwkv6_lm_io")
    with torch.no_grad():
        state = RWKVState.zeros(config, len(io["input_ids"]))
        logits = []
        for column in io["input_ids"].split(1, 1):
            hidden = inference.read(model, model.emb(column), state)
            assert hidden is not None
            logits.append(model.logits(hidden))
    assert error(torch.cat(logits, 1), io["logits"]) < 2e-4


@needs_kernel
def test_the_state_given_in_is_not_written_to():
    model = language_model()
    state = prefix(model)
    layers, copies = list(state.layers), state.clone().layers
    steps(model, state, True, torch.randint(50, (1, 3)))
    for layer, copy in zip(layers, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, copy, strict=True))
    assert state.layers[0] is not layers[0]


@needs_kernel
def test_memory_of_a_state_is_used_again_only_when_nobody_holds_it():
    model = language_model()
    tokens, state = torch.randint(50, (1, 12)), prefix(model)
    held, copies = [], []
    for place, column in enumerate(tokens.split(1, 1)):
        with torch.inference_mode(place % 3 == 0), torch.no_grad():
            _, state = model(model.emb(column), state)
        # now and then the whole state, one matrix of it, or nothing is kept
        kept = {0: [layer.wkv for layer in state.layers], 1: [state.layers[1].wkv[:, 1]]}.get(place % 4, [])
        held += kept
        copies += [wkv.clone() for wkv in kept]
    assert len(held) == 12 and all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    # a state that inference mode has not touched can be learnt from
    with torch.inference_mode():
        steps(model, prefix(model), True, tokens)
    with torch.no_grad():
        _, state = model(model.emb(tokens[:, :1]), prefix(model))
    assert not state.layers[0].wkv.is_inference()


@needs_kernel
@pytest.mark.parametrize("change", ["in place", "data", "assigned", "module", "precision"])
def test_changed_weights_are_seen(change):
    model, other = language_model(seed=1), language_model(seed=2)
    tokens = torch.randint(50, (1, 2))
    steps(model, prefix(model), True, tokens)  # now there is a plan
    if change == "in place":
        with torch.no_grad():
            model.blocks[1].att.key.weight.mul_(2)
    elif change == "data":
        model.blocks[1].ffn.value.weight.data = other.blocks[1].ffn.value.weight.data.clone()
    elif change == "assigned":
        model.load_state_dict(other.state_dict(), assign=True)
    elif change == "module":
        model.blocks[0].att.output = other.blocks[0].att.output
        model.blocks[2] = other.blocks[2]
    else:
        model.bfloat16().float()
    assert was_taken(model)
    state = prefix(model)
    assert error(*(steps(model, state.clone(), kernel, tokens)[0] for kernel in (True, False))) < 1e-4


@needs_kernel
def test_where_the_kernel_does_not_apply_the_modules_do_the_work():
    model = language_model()
    assert was_taken(model) and not was_taken(language_model(version=5))
    assert was_taken(model, inference.MAX_BATCH + 1)  # by prefill, as a prompt of one token
    assert not was_taken(language_model(dtype=torch.float64)) and not was_taken(language_model(dtype=torch.float16))
    assert inference.read(model, model.emb(torch.tensor([[1]])), prefix(model)) is None, "gradients are wanted"
    with use_kernel(False):
        assert not was_taken(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not was_taken(model)
    seen = []
    hook = model.blocks[1].att.gate.register_forward_hook(lambda *_: seen.append(1))
    steps(model, prefix(model), True, torch.tensor([[1]]))
    assert seen
    hook.remove()
    assert was_taken(model)
    nn.utils.parametrize.register_parametrization(model.blocks[0].ffn.key, "weight", nn.Identity())
    assert not was_taken(model)
    mixed = language_model()
    mixed.blocks[0].ffn.key.bfloat16()
    assert not was_taken(mixed)


@needs_kernel
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_decoding import error, language_model, prefix, quantize_linears, steps
for inner, quantized in ((None, False), (100, False), (None, True)):
    for dtype in (torch.float32, torch.bfloat16):
        model = language_model(inner=inner, dtype=dtype)
        if quantized:
            quantize_linears(model.blocks)
        for batch in (1, 3):
            state, tokens = prefix(model, batch), torch.randint(50, (batch, 2))
            ours, wanted = (steps(model, state.clone(), kernel, tokens)[0] for kernel in (True, False))
            assert error(ours, wanted) <= (1e-5 if dtype == torch.float32 else 0.03) * wanted.abs().max()
"""
    path = os.pathsep.join([str(Path(visualrwkv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    call = [sys.executable, "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr


def test_same_greedy_answer_with_and_without_the_kernel(vlm, pictures):
    questions = ["What is red?", "What is the colour of it?", "Is it?"]
    answers = []
    for kernel in (True, False):
        with use_kernel(kernel):
            one = vlm.ask(pictures[0], questions[0], max_new_tokens=12)
            answers.append([one, *vlm.ask(pictures[:3], questions, max_new_tokens=12)])
    assert answers[0] == answers[1]


def test_rows_of_eight_bits_are_off_by_at_most_half_a_scale():
    weight = torch.randn(7, 33) * torch.logspace(-6, 3, 7)[:, None]
    weight[3] = 0
    quantized, scale = quantize_rows(weight)
    assert ((quantized * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert not quantized[3].any()


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_map_of_eight_bits(kernel, rows, dtype):
    linear = nn.Linear(70, 33, bias=False)
    ours = Int8Linear.of(linear).to(dtype)
    assert ours.weight.dtype == torch.int8 and ours.scale.dtype == torch.float32
    x = torch.randn(2, rows, 70, dtype=dtype)
    wanted = torch.nn.functional.linear(x.double(), ours.weight.double() * ours.scale.double()[:, None])
    with torch.no_grad(), use_kernel(kernel):
        y = ours(x)
    assert y.dtype == dtype and error(y.double(), wanted) < (1e-5 if dtype == torch.float32 else 0.02)


def test_eight_bits_stay_within_the_range_of_float16():
    ours = Int8Linear.of(nn.Linear(512, 33, bias=False)).to(torch.float16)
    x = 30 * torch.randn(40, 512).half()  # sums without the scale would be infinite
    assert (x.float() @ ours.weight.float().T).abs().max() > torch.finfo(torch.float16).max
    with torch.no_grad():
        y = ours(x)
    wanted = x.double() @ (ours.weight.double() * ours.scale.double()[:, None]).T
    assert y.dtype == torch.float16 and error(y.double(), wanted) < 2e-3 * wanted.abs().max()


@needs_kernel
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_reads_eight_bits_directly(batch, dtype):
    model = language_model(dtype=dtype)
    quantize_linears(model.blocks)
    assert was_taken(model, batch)
    state, tokens = prefix(model, batch), torch.randint(50, (batch, 4))
    ours, wanted = (steps(model, state.clone(), kernel, tokens)[0] for kernel in (True, False))
    assert error(ours, wanted) <= (1e-5 if dtype == torch.float32 else 0.03) * wanted.abs().max()


def test_load_with_eight_bits(random_folder, pictures, tmp_path):
    vlm = visualrwkv.load(random_folder, quantize="int8")
    kinds = {type(module) for module in vlm.model.rwkv.modules()}
    assert Int8Linear in kinds and nn.Linear not in kinds
    assert not any(isinstance(module, Int8Linear) for module in [*vlm.model.vit.modules(), *vlm.model.proj.modules()])
    assert vlm.model.rwkv.emb.weight.dtype == vlm.model.dtype == torch.float32
    assert isinstance(vlm.ask(pictures[0], "What is red?", max_new_tokens=4), str)
    with pytest.raises(InputError, match="int8"):
        vlm.model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("length", "longest", "images", "size", "wanted"),
    [
        (10, 4, [], 3, [(0, 4), (4, 8), (8, 10)]),
        (10, 4, [3], 3, [(0, 3), (3, 7), (7, 10)]),
        (10, 2, [1], 6, [(0, 1), (1, 7), (7, 9), (9, 10)]),
        (12, 4, [0, 2], 5, [(0, 7), (7, 11), (11, 12)]),  # two rows whose images overlap
        (3, 99, [0], 3, [(0, 3)]),
    ],
)
def test_pieces_never_cut_an_image(length, longest, images, size, wanted):
    assert pieces(length, longest, images, size) == wanted


@pytest.mark.parametrize("scan", ["bi", "multi"])
def test_a_prompt_read_in_pieces_equals_the_whole(scan, tmp_path):
    from visualrwkv.loading import read_folder

    model = read_folder(build_random_model(tmp_path / scan, scan=scan, layers=4))[0].requires_grad_(False)
    size, image = model.config.num_image_tokens, model.config.image_token_id
    rows = [[3, 9] + [image] * size + [7] * 5 + [image] * size + [4, 5], [8] * 11 + [image] * size + [6] * 3]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        model.prefill_chunk = 0
        whole = model(ids, pixel_values=pixels, attention_mask=mask)
        for chunk in (1, 7, 20):
            model.prefill_chunk = chunk
            out = model(ids, pixel_values=pixels, attention_mask=mask)
            assert error(out.logits, whole.logits) < 1e-4 and out.cache.seen == length
            for a, b in zip(out.cache.layers, whole.cache.layers, strict=True):
                assert all(error(x, y) < 1e-4 for x, y in zip(a, b, strict=True))
            last = model(ids, pixel_values=pixels, attention_mask=mask, logits_to_keep=3).logits
            assert error(last, whole.logits[:, -3:]) < 1e-4


@needs_kernel
def test_there_is_a_kernel():
    assert build.load(retry=True) == ""


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_goes_on_from_any_state(dtype):
    """One that was read from text at once, selected, repeated, or put together from a file's tensors."""
    model, tokens = language_model(dtype=dtype), torch.randint(50, (1, 3))
    state = prefix(model, 3)
    wanted, after = steps(model, state.select([2]), True, tokens)
    saved = RWKVState.from_tensors(state.tensors(), state.seen)
    for other in (saved.select([2]), state.select([2]).repeat(2).select([1])):
        logits, its = steps(model, other, True, tokens)
        assert torch.equal(logits, wanted) and its.seen == after.seen == state.seen + 3
    both = steps(model, state.select([2, 0, 2]), True, tokens.expand(3, -1))[0]
    assert error(both[2], wanted[0]) <= (1e-5 if dtype == torch.float32 else 0.03) * wanted.abs().max()


@needs_kernel
def test_embeddings_may_be_a_view_of_more():
    model = language_model()
    embeds, state = torch.randn(3, 4, 128), prefix(model, 3)
    with torch.no_grad():
        view = inference.read(model, embeds[:, 2:3], state.clone())
        assert torch.equal(view, inference.read(model, embeds[:, 2:3].contiguous(), state))


@needs_kernel
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@torch.no_grad()
def test_head_without_a_copy(dtype, limit):
    head, x = nn.Linear(130, 37, bias=False).to(dtype), torch.randn(3, 1, 130).to(dtype)
    wanted = torch.nn.functional.linear(x.double(), head.weight.double())
    assert error(inference.project(head, x).double(), wanted) < limit
    biased = nn.Linear(130, 37).to(dtype)
    assert torch.equal(inference.project(biased, x), biased(x))


@torch.no_grad()
def test_linear_map_of_eight_bits_in_float64_stays_exact():
    linear, x = Int8Linear.of(nn.Linear(70, 33, bias=False)), torch.randn(2, 70, dtype=torch.float64)
    wanted = x @ (linear.weight.double() * linear.scale.double()[:, None]).T
    assert error(linear(x), wanted) < 1e-12


@needs_kernel
def test_huge_pages_leave_the_weights_as_they_are():
    weights = [torch.randn(1500, 1000), torch.randn(3), torch.randn(2000, 1500).bfloat16(), torch.randn(5, 7).T]
    copies = [x.clone() for x in weights]
    torch.ops.visualrwkv.use_huge_pages(weights)
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


def test_environment_variable_keeps_to_the_modules(random_folder):
    script = (
        "import sys, torch, visualrwkv; from visualrwkv import inference, RWKVState; torch.set_grad_enabled(False); "
        "m = visualrwkv.load(sys.argv[1]).model.rwkv; x, s = torch.ones(1, 1, 128), RWKVState.zeros(m.config, 1); "
        "print(inference.read(m, x, s), tuple(m(x, s)[0].shape))"
    )
    path = os.pathsep.join([str(Path(visualrwkv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "VISUALRWKV_KERNEL": "0", "PYTHONPATH": path}
    call = [sys.executable, "-c", script, str(random_folder)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0 and done.stdout.split("\n")[0] == "None (1, 1, 128)", done.stderr
