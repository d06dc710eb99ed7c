"""`visualrwkv.load`: from a name to a model that answers.

A name is the embedded model (none given, or "embedded"), a folder written by `save_pretrained`, an official .pth
checkpoint, or the same two on the Hub ("owner/repo" and "owner/repo:file.pth"). Only names that exist nowhere on disk
reach the network.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from visualrwkv.errors import InputError, one_line, short
from visualrwkv.paths import as_path
from visualrwkv.prompt import POSITIONS
from visualrwkv.scan import SCANS

EMBEDDED = Path(__file__).parent / "assets" / "tiny"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+\.pth)?")
_FOLDER_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def load(
    name: str | os.PathLike | None = None,
    *,
    device="auto",
    dtype="auto",
    prompt: str | None = None,
    scan: str | None = None,
    quantize: str | None = None,
):
    """Load a model and its processor.

    Args:
        name: None or "embedded" for the embedded model; a folder; a .pth file; "owner/repo" or "owner/repo:file.pth" on
            the Hub.
        device: "auto" (CUDA where there is one, else the CPU) or a torch device.
        dtype: "auto", a torch dtype or its name. "auto" is float32 for the embedded model, otherwise that of the files
            (bfloat16 in the official ones); on the CPU float16 becomes float32, which takes twice the memory and is
            several times as fast.
        prompt: where the picture stands, "sandwich", "first" or "last"; by default what the checkpoint says.
        scan: how the layers read patches, "bi", "uni" or "multi"; by default what the checkpoint says.
        quantize: None, or "int8": the matrices of the language model's layers and its head become weights of eight bits
            with a scale per row; embedding, tower and projector stay as they are. For inference; such a model is not
            saved.

    Returns:
        A `VisualRWKV`.

    Raises:
        InputError: the name leads to nothing usable, or an option is unknown; the message names the remedy.
    """
    from visualrwkv.chat import VisualRWKV

    for option, value, known in (
        ("quantize", quantize, ["int8"]),
        ("scan", scan, SCANS),
        ("prompt", prompt, POSITIONS),
    ):
        if value is not None and value not in known:
            raise InputError(f"{option} is {short(value)}; use one of {', '.join(known)}, or None")
    target, number = pick_device(device), pick_dtype(dtype)
    path = find(name)
    if path.is_file():
        from visualrwkv import checkpoints

        model, processor = checkpoints.load_checkpoint(
            path, device=target, dtype=None if number == "auto" else number, scan=scan, prompt=prompt
        )
        _check_vocabulary(model, processor, path)
        return VisualRWKV(_quantized(_computable(model, number), quantize), processor)
    with quiet_transformers():
        model, processor = read_folder(path, "float32" if name is None and number == "auto" else number)
    _check_vocabulary(model, processor, path)
    if scan is not None:
        _replace(model.config, "scan", scan)
    if prompt is not None:
        _replace(model.config, "prompt", prompt)
        processor.prompt = prompt
    return VisualRWKV(_quantized(_computable(model.to(target), number), quantize), processor)


def find(name: str | os.PathLike | None) -> Path:
    """Path of the folder or .pth file that a model name stands for, fetched from the Hub if need be."""
    if name is None or (name == "embedded" and not os.path.exists(name)):
        if not (EMBEDDED / "config.json").is_file():
            raise InputError(f"{EMBEDDED}: the embedded model is missing from this installation; pass a model name")
        return EMBEDDED
    path = as_path(name, "a folder, a .pth file or a Hub name, or None for the embedded model")
    name = os.fspath(name)
    if os.path.isdir(path):  # unlike the methods of Path it takes a name of any length
        return path
    if os.path.isfile(path):
        if path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
            raise InputError(f"{name}: belongs to the folder it is in; pass that folder")
        if path.suffix not in (".pth", ".safetensors"):
            raise InputError(f"{name}: a checkpoint file must end in .pth or .safetensors")
        return path
    if not _HUB_NAME.fullmatch(name) or name.startswith((".", "~", "/")):
        raise InputError(
            f"{name}: no such folder or file, and not a Hub name either; pass a folder with a config.json, "
            "a .pth file, owner/repo or owner/repo:file.pth"
        )
    return fetch(name)


def fetch(name: str) -> Path:
    """Download "owner/repo" or "owner/repo:file.pth", or find it in the local cache of the Hub's client."""
    import httpx
    from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

    repo, _, file = name.partition(":")
    try:
        if file:
            return Path(hf_hub_download(repo, file))
        folder = Path(snapshot_download(repo, allow_patterns=_FOLDER_FILES))
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{name}: no such folder or file here, and {constants.ENDPOINT} has no such repository, or it is private; "
            "check the spelling, or set HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(name, constants, error) from None
    except errors.EntryNotFoundError:
        raise InputError(f"{name}: {repo} has no file {file!r}; see {constants.ENDPOINT}/{repo}/tree/main") from None
    except errors.HFValidationError as error:
        raise InputError(f"{name}: not a Hub name: {one_line(error)}") from None
    except (
        errors.HfHubHTTPError,
        errors.OfflineModeIsEnabled,
        httpx.HTTPError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise _unreachable(name, constants, error) from None
    if not (folder / "config.json").is_file():
        raise InputError(f"{name}: the repository has no config.json; for a .pth checkpoint pass {repo}:FILE.pth")
    return folder


def _unreachable(name, constants, error):
    state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} did not deliver it"
    return InputError(
        f"{name}: no such folder or file here, and {state} ({type(error).__name__}); check the name and the network, "
        "set HF_ENDPOINT to a mirror, unset HF_HUB_OFFLINE, or pass a local path"
    )


def read_folder(path: str | os.PathLike, dtype="auto"):
    """Model and processor of a folder written by `save_pretrained`, strictly: no tensor may be missing or misshapen.

    Args:
        path: the folder.
        dtype: torch dtype or its name; "auto" for that of the files.
    Raises:
        InputError: no or unusable config.json, unreadable weights, missing, unexpected or misshapen tensors (by name).
    """
    from safetensors import SafetensorError

    from visualrwkv.modeling import VisualRWKVForConditionalGeneration
    from visualrwkv.processing import VisualRWKVProcessor

    path = Path(path)
    check_config(path)
    try:
        model, report = VisualRWKVForConditionalGeneration.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = VisualRWKVProcessor.from_pretrained(path, local_files_only=True)
    except InputError as error:
        raise InputError(error if str(path) in str(error) else f"{path}: {error}") from None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be loaded: {one_line(error)}; save or download the folder again") from error
    problems = [
        f"{len(report[kind])} {word} ({', '.join(_names(report[kind]))})"
        for kind, word in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "misshapen"),
        )
        if report[kind]
    ]
    if problems:
        raise InputError(f"{path}: the weights do not fit the config.json; tensors: {'; '.join(problems)}")
    return model, processor


def check_config(path: str | os.PathLike) -> None:
    """Refuse a folder whose config.json is absent, unreadable or describes another kind of model."""
    file = Path(path) / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        if (Path(path) / "adapter_config.json").is_file():
            raise InputError(
                f"{path}: holds a peft adapter alone; merge it into its model (`merge_and_unload`), save that with its "
                "processor and pass the folder"
            ) from None
        raise InputError(
            f"{path}: the folder has no config.json; pass one written by save_pretrained or `visualrwkv convert`"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: cannot be read: {one_line(error)}; save or download the folder again") from None
    if kind == "visualrwkv_text":
        raise InputError(
            f"{path}: a language model alone, it has no vision part; to train it on pictures, give the folder as "
            "model.from and a tower as model.vision in a recipe of `visualrwkv train`"
        )
    if kind != "visualrwkv":
        raise InputError(f"{file}: model_type is {kind!r}, not 'visualrwkv'; this folder holds another kind of model")


def pick_device(device):
    """torch device of a name; "auto" is CUDA where there is one, else the CPU."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N ({one_line(error)})") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there ({torch.cuda.device_count()} CUDA devices found); use cpu")
    if target.type not in ("cpu", "cuda"):
        try:
            torch.empty(0).to(target)
        except (RuntimeError, AssertionError) as error:  # how PyTorch says what it was built without
            raise InputError(f"device {device!r} is not there ({one_line(error)}); use cpu") from None
    return target


def pick_dtype(dtype):
    """torch dtype of its name; "auto" stays "auto"."""
    import torch

    if isinstance(dtype, torch.dtype) and dtype.is_floating_point or dtype == "auto":
        return dtype
    if dtype in DTYPES:
        return getattr(torch, dtype)
    raise InputError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")


def _check_vocabulary(model, processor, path):
    """InputError where the tokenizer writes ids that the model does not have."""
    rows, needed = model.config.text_config.vocab_size, len(processor.tokenizer)
    if needed > rows:
        raise InputError(
            f"{path}: the model has {rows:,} tokens, but its tokenizer needs {needed:,}; put the rwkv_vocab.txt that "
            "the model was trained with into the same folder"
        )


def _computable(model, number):
    """The model, with "auto" in numbers that its device computes fast."""
    import torch

    slow = number == "auto" and model.device.type == "cpu" and model.dtype == torch.float16
    return model.float() if slow else model


def _quantized(model, quantize):
    if quantize == "int8":
        from visualrwkv.ops.int8 import quantize_linears

        quantize_linears(model.rwkv)
    return model


def _replace(config, name, value):
    """Change one field of a config and check it as its constructor would."""
    type(config).from_dict(config.to_dict() | {name: value})
    setattr(config, name, value)


def _names(keys, limit=8):
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    return names[:limit] + ["..."] * (len(names) > limit)


@contextlib.contextmanager
def quiet_transformers():
    """Keeps transformers' load report and progress bar off stderr; what matters in them is raised as InputError."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
