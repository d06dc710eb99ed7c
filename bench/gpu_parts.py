"""What `bench.gpu` runs, a part at a time: checks and measurements on the GPU, each reported as a line of JSON."""

import json
import statistics
import time

MODELS = {  # the released RWKV-6 models
    "1.6B": {"hidden_size": 2048, "num_hidden_layers": 24},
    "3B": {"hidden_size": 2560, "num_hidden_layers": 32},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "time_mix_rank": 64, "decay_rank": 128},
}
ROWS = ((8, 1024, 8), (8, 4096, 64), (1, 641, 32), (1, 2048, 32), (1, 8192, 32))  # batch, tokens, heads
CHECKED = (  # these, and the head size
    ((2, 300, 4), 64),
    ((64, 70, 4), 64),
    ((2, 9, 4), 64),
    ((2, 100, 2), 32),
    ((2, 100, 2), 128),
)
DECAYS = ((-3.5, 1.5), (0.0, 1.5), (2.0, 1.5), (-4.0, 8.0), (20.0, 0.0), (-300.0, 0.0))  # mean and spread of w
PROMPT, WRITTEN, SEQUENCE = 641, 64, 2048  # tokens read, tokens written, tokens of a training sequence
COPIED, SQUARE = 1 << 28, 8192  # of the probes: numbers copied, rows and columns multiplied
MARK = "RESULT "


def report(case: str, **numbers) -> None:
    """One line of the table; the parent process reads it."""
    print(MARK + json.dumps({"case": case} | numbers), flush=True)


def attempt(case: str, function, *arguments) -> None:
    """Run a case; what goes wrong is its result."""
    import torch

    try:
        function(case, *arguments)
        torch.cuda.empty_cache()  # which fails, too, where the GPU is lost
    except Exception as error:  # whatever it is, the other cases go on
        report(case, failed=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}")


def milliseconds(function, seconds: float = 1.0, graph: bool = True) -> dict:
    """Median, quartiles and number of runs of a call on the current device.

    Args:
        graph: try to record the call. False where it waits for the GPU: a recording that fails can spoil the process.
    """
    import torch

    from visualrwkv.cuda_graphs import record

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    run, how = function, "calls"
    if graph:
        try:
            run, how = record(function), "graph"
        except RuntimeError:  # allocates or synchronizes in a way that cannot be recorded
            torch.cuda.synchronize()
    times, end = [], time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "ms quartiles": [low, high], "runs": len(times), "timed": how}


def probes() -> dict:
    """Report what the machine can do: copy bandwidth (read and written bytes) and bfloat16 matrix products."""
    import torch

    source = torch.empty(COPIED, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))["ms"]
    a = torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16)
    product = milliseconds(lambda: a @ a)["ms"]
    numbers = {"copy GB/s": 2 * source.nbytes / copy / 1e6, "bf16 TFLOP/s": 2 * SQUARE**3 / product / 1e9}
    report("probes", **numbers)
    return numbers


def sample(batch, length, heads, size=64, mean=-2.0, spread=1.5, dtype=None):
    """r, k, v, w, u, state on the GPU."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    r, k, v, w = (normal(batch, length, heads, size) for _ in range(4))
    rows = [x.to(dtype or torch.float32) for x in (r, k, v, w * spread + mean)]
    return [*rows, normal(heads, size), normal(batch, heads, size, size)]


def part_build():
    from visualrwkv.ops import build

    start = time.perf_counter()
    reason = build.load(retry=True, device="cuda")
    seconds = time.perf_counter() - start
    report("build", seconds=seconds, folder=str(build.cache_folder("cuda")), **({"failed": reason} if reason else {}))


def _gradients(form, inputs, gy, gs):
    import torch

    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y, state = form(*inputs)
    return [y.detach(), state.detach(), *torch.autograd.grad((y * gy).sum() + (state * gs).sum(), inputs)]


def _errors(case, shape, size, mean, spread, dtype):
    import torch

    from visualrwkv.ops import wkv6_chunked, wkv6_kernel

    inputs = sample(*shape, size, mean, spread, dtype)
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    exact = _gradients(wkv6_chunked, [x.double() for x in inputs], gy.double(), gs.double())
    results = _gradients(wkv6_kernel, inputs, gy, gs)
    errors, limit = {}, 1e-5 if dtype == torch.float32 else 1e-2
    for name, value, wanted in zip(("y", "state", "r", "k", "v", "w", "u", "s0"), results, exact, strict=True):
        worst = (value.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
        errors[name] = float(worst)
    # one comparison also fails where an error is not a number
    good = all(error <= limit for error in errors.values())
    report(case, errors=errors, **({} if good else {"failed": f"an error above {limit:g}"}))


def part_check():
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for shape, size in CHECKED:
            attempt(f"check {name} {shape} N={size}", _errors, shape, size, -2.0, 1.5, dtype)
    for mean, spread in DECAYS:
        attempt(f"check decay {mean}, {spread}", _errors, (2, 300, 4), 64, mean, spread, torch.float32)


def part_opcheck():
    import torch

    from visualrwkv.ops import wkv6_kernel

    def opcheck(case):
        inputs = [x.requires_grad_() for x in sample(1, 40, 2)]
        wkv6_kernel(*inputs)
        report(case, **torch.library.opcheck(torch.ops.visualrwkv.wkv6.default, tuple(inputs)))

    def gradcheck(case):
        inputs = [x.requires_grad_() for x in sample(1, 20, 1, 32, -1.0)]
        torch.autograd.gradcheck(wkv6_kernel, inputs, eps=1e-2, atol=2e-2, rtol=2e-2, fast_mode=True)
        report(case, gradcheck="SUCCESS")

    attempt("opcheck", opcheck)
    attempt("gradients against differences", gradcheck)


def _wkv_forms():
    """name -> function of r, k, v, w, u, state."""
    from visualrwkv.ops import wkv6_chunked, wkv6_kernel

    forms = {"visualrwkv": wkv6_kernel, "PyTorch chunked": wkv6_chunked}
    try:
        from fla.ops.rwkv6 import chunk_rwkv6
    except ImportError:
        return forms

    def fla(r, k, v, w, u, state):
        decay = -w.float().exp()
        return chunk_rwkv6(r, k, v, decay, u, scale=1.0, initial_state=state, output_final_state=True)

    return forms | {"fla chunk_rwkv6": fla}


def _time_wkv(case, form, shape, copy, backward):
    import torch

    from visualrwkv.ops import wkv6_chunked

    batch, length, heads = shape
    inputs = sample(*shape, dtype=torch.bfloat16)
    gy = torch.randn_like(inputs[0])
    moved = batch * length * heads * 64 * 2 * (5 + 9 * backward)  # bytes of rows read and written, once each

    def forward_only():
        with torch.no_grad():
            form(*inputs)

    def both():
        wanted = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.grad(form(*wanted)[0], wanted, gy)

    # the chunked form asks the GPU how many channels decay strongly
    numbers = milliseconds(both if backward else forward_only, graph=form is not wkv6_chunked)
    rate = moved / numbers["ms"] / 1e6
    report(case, **numbers, **{"GB/s": rate, "of copy bandwidth": rate / copy})


def part_wkv():
    numbers = probes()
    for shape in ROWS:
        for backward in (False, True):
            for name, form in _wkv_forms().items():
                title = f"wkv {'fwd+bwd' if backward else 'fwd'} {shape} {name}"
                attempt(title, _time_wkv, form, shape, numbers["copy GB/s"], backward)


def _model(name):
    """The language model on the GPU with random bfloat16 weights."""
    import torch

    from visualrwkv.configuration import VisualRWKVTextConfig
    from visualrwkv.rwkv import RWKV

    config = VisualRWKVTextConfig(**MODELS[name])
    with torch.device("meta"):
        rwkv = RWKV(config)
    rwkv = rwkv.to(torch.bfloat16).to_empty(device="cuda").eval()
    with torch.no_grad():
        for key, parameter in rwkv.named_parameters():
            parameter.normal_(-4.0 if key.endswith("time_decay") else 0.0, 0.02)
            if parameter.ndim == 1 and key.endswith("weight"):  # norms
                parameter.add_(1.0)
    return rwkv


def _decode(case, rwkv, batch, copy):
    import torch

    from visualrwkv.ops import use_kernel
    from visualrwkv.state import RWKVState

    read = sum(x.nbytes for x in rwkv.parameters()) - rwkv.emb.weight.nbytes

    def seconds_per_token(count):
        state = RWKVState.zeros(rwkv.config, batch, device="cuda", dtype=torch.bfloat16)
        tokens = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        times = []
        for _ in range(count + 8):
            torch.cuda.synchronize()
            start = time.perf_counter()
            hidden, state = rwkv(rwkv.emb(tokens), state)
            tokens = rwkv.head(hidden[:, -1]).argmax(-1, keepdim=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[8:]), state

    with torch.inference_mode():
        seconds, state = seconds_per_token(WRITTEN)
        with use_kernel(False):
            plain, _ = seconds_per_token(WRITTEN // 4)
    moved = read + 2 * state.nbytes
    report(
        case,
        **{"tokens/s": batch / seconds, "ms": 1e3 * seconds, "without graph and kernels ms": 1e3 * plain},
        **{"GB/s": moved / seconds / 1e9, "of copy bandwidth": moved / seconds / 1e9 / copy},
    )


def part_decode():
    numbers = probes()
    for name in MODELS:
        rwkv = _model(name)
        for batch in (1, 128) if name == "1.6B" else (1,):
            attempt(f"decode {name} batch {batch}", _decode, rwkv, batch, numbers["copy GB/s"])
        del rwkv


def _prefill(case, name, length, product):
    import torch

    rwkv = _model(name)
    tokens = torch.randint(0, rwkv.config.vocab_size, (1, length), device="cuda")
    weights = sum(x.numel() for key, x in rwkv.blocks.named_parameters() if x.ndim >= 2)

    def read():
        with torch.no_grad():
            hidden, _ = rwkv(rwkv.emb(tokens))
            rwkv.head(hidden[:, -1])

    inputs = sample(1, length, rwkv.config.num_heads, dtype=torch.bfloat16)
    from visualrwkv.ops import wkv6
    from visualrwkv.ops.kernel import ready_on_cuda

    def wkv():
        with torch.no_grad():
            wkv6(*inputs)

    graph = ready_on_cuda()  # else it is the chunked form
    numbers = milliseconds(read, graph=graph)
    operator = milliseconds(wkv, graph=graph)["ms"] * rwkv.config.num_hidden_layers
    floor = 2 * weights * length / product / 1e9
    report(case, **numbers, **{"wkv share": operator / numbers["ms"], "of matrix products": floor / numbers["ms"]})


def part_prefill():
    numbers = probes()
    for name in MODELS:
        attempt(f"prefill {PROMPT} {name}", _prefill, name, PROMPT, numbers["bf16 TFLOP/s"])


def _train(case, rwkv, batch, length, product):
    import torch
    import torch.nn.functional as F

    tokens = torch.randint(0, rwkv.config.vocab_size, (batch, length), device="cuda")
    weights = sum(x.numel() for key, x in rwkv.named_parameters() if x.ndim >= 2 and not key.startswith("emb."))

    def step():
        rwkv.zero_grad(set_to_none=True)
        hidden, _ = rwkv(rwkv.emb(tokens))
        F.cross_entropy(rwkv.head(hidden).flatten(0, 1), tokens.flatten()).backward()

    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    work = 8 * weights * batch * length  # forward, forward again, backward
    report(
        case,
        **{
            "ms": 1e3 * seconds,
            "tokens/s": batch * length / seconds,
            "of matrix products": work / seconds / product / 1e12,
        },
        **{"peak GiB": torch.cuda.max_memory_allocated() / 2**30},
    )


def part_train():
    import torch

    numbers = probes()
    rwkv = _model("1.6B").train()
    for block in rwkv.blocks:  # what transformers' gradient_checkpointing_enable does to the whole model
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = lambda function, *x: torch.utils.checkpoint.checkpoint(
            function, *x, use_reentrant=False
        )
    for batch in (1, 4):
        title = f"train 1.6B batch {batch} of {SEQUENCE}, recomputing"
        attempt(title, _train, rwkv, batch, SEQUENCE, numbers["bf16 TFLOP/s"])


PARTS = {
    "build": part_build,
    "check": part_check,
    "opcheck": part_opcheck,
    "wkv": part_wkv,
    "decode": part_decode,
    "prefill": part_prefill,
    "train": part_train,
}
