"""What `visualrwkv info` prints: the installation, and of a model its sizes and costs."""

import os
import platform
from importlib import metadata

PACKAGES = (
    "torch",
    "transformers",
    "open_clip_torch",
    "timm",
    "pillow",
    "numpy",
    "gradio",
    "safetensors",
    "huggingface_hub",
    "rwkv",
    "accelerate",
)


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python and of what the results depend on; None where one is not installed."""
    from visualrwkv import __version__

    found: dict[str, str | None] = {"visualrwkv": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def installation() -> list[tuple[str, str]]:
    """Versions, devices and the form of the operator, as (name, value) pairs."""
    import torch

    from visualrwkv.ops.build import describe

    rows = [(package, version or "not installed") for package, version in versions().items()]
    rows.append(("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.device_count():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        rows.append(("cuda", f"no device ({built})"))
    rows += [("wkv6 on cpu", describe("cpu")), ("wkv6 on cuda", describe("cuda"))]
    return rows


def model_sizes(model) -> list[tuple[str, str]]:
    """Parameters, state and arithmetic of a model, as (name, value) pairs.

    One token costs 2 FLOPs for each weight of a matrix product, and 5 N^2 for each head of the recurrence (three
    passes over its N x N state: decay, k v^T and r S). D, L, N, V are width, layers, head size and vocabulary.
    """
    config, text = model.config, model.config.text_config
    counts = {
        part: sum(parameter.numel() for parameter in getattr(model, part).parameters())
        for part in ("rwkv", "vit", "proj")
    }
    matrices = sum(
        parameter.numel()
        for name, parameter in model.rwkv.named_parameters()
        if name.endswith(".weight") and parameter.ndim == 2 and not name.startswith("emb.")
    )
    low_rank = sum(
        parameter.numel()
        for name, parameter in model.rwkv.named_parameters()
        if parameter.ndim >= 2 and name.endswith(("_w1", "_w2"))
    )
    recurrence = 5 * text.attention_size * text.head_size * text.num_hidden_layers
    dtype = next(model.parameters()).dtype
    state = text.state_bytes(dtype.itemsize)
    rows, columns = config.feature_grid
    return [
        ("language model", f"RWKV-{text.version}, {counts['rwkv']:,} parameters"),
        ("", f"D {text.hidden_size}, L {text.num_hidden_layers}, N {text.head_size}, V {text.vocab_size}"),
        ("vision tower", f"{config.vision_config.name or 'open_clip'}, {counts['vit']:,} parameters"),
        ("projector", f"{config.projector}, {counts['proj']:,} parameters"),
        (
            "picture",
            f"{config.vision_config.image_size} px, {config.num_image_tokens} tokens ({rows}x{columns} patches)",
        ),
        ("scan, prompt", f"{config.scan}, {config.prompt}"),
        ("dtype, device", f"{str(dtype).removeprefix('torch.')}, {model.device}"),
        ("weights", f"{sum(parameter.nbytes for parameter in model.parameters()):,} bytes"),
        (
            "state",
            f"{text.state_size:,} numbers, {state:,} bytes for each conversation, however long",
        ),
        ("one token", f"{2 * (matrices + low_rank) + recurrence:,} FLOPs"),
    ]


def report(model=None) -> str:
    """The text of `visualrwkv info [MODEL]`."""
    rows = installation() + ([("", "")] + model_sizes(model) if model is not None else [])
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)
