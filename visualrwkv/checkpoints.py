"""Checkpoint files: official VisualRWKV and bare RWKV files in, folders out, and back again.

Every size is read off the shapes of the tensors, and every tensor is accounted for: what is missing, unexpected or of
the wrong shape is named. Files are mapped into memory, so a tensor that already has the wanted dtype is never copied.

| file | tensors |
| --- | --- |
| VisualRWKV v6.0 (or v5 while training) | `rwkv.*`, `vit.vision_model.*`, `proj.weight` |
| VisualRWKV-5, `NAME_rwkv.pth` and `NAME_visual.pth` | `emb`, `blocks`, ... and `vit.vision_model.*`, `proj.weight` |
| RWKV-5 and RWKV-6 World | `emb`, `blocks`, `ln_out`, `head` |
"""

import contextlib
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from visualrwkv.checkpoint_layout import from_official, text_config, to_official, vision_config
from visualrwkv.configuration import IMAGE_TOKEN_ID, VisualRWKVConfig, VisualRWKVTextConfig, VisualRWKVVisionConfig
from visualrwkv.errors import InputError, one_line

_PARTS = {"_rwkv": "_visual", "_visual": "_rwkv"}  # how the two files of a VisualRWKV-5 are named
_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, zipfile.BadZipFile)


def load_checkpoint(
    path,
    *,
    second=None,
    device="cpu",
    dtype=None,
    scan: str | None = None,
    prompt: str | None = None,
    vision: VisualRWKVVisionConfig | None = None,
    vision_heads: int | None = None,
):
    """Model and processor of a checkpoint file.

    Args:
        path: an official file, or one part of a VisualRWKV-5; with `vision` a bare RWKV, file or folder.
        second: the other part; by default the `_visual.pth` or `_rwkv.pth` beside it.
        device: where the tensors go, one by one.
        dtype: torch dtype or its name for all of them; None for the dtype of the language model in the file.
        scan, prompt: as in `VisualRWKVConfig`. By default as the files were trained: `bi` and `sandwich` for RWKV-6,
            `uni` and `first` for RWKV-5.
        vision: for a bare RWKV, the tower to train it with; tower and projector then start at random.
        vision_heads: attention heads of the tower. No tensor tells; by default 64 channels each, at least 4 heads.
    Returns:
        `VisualRWKVForConditionalGeneration` in evaluation mode, `VisualRWKVProcessor`.
    Raises:
        InputError: not a checkpoint, only one part of one, or tensors that do not fit (named).
    """
    tensors, source = _read_parts(path, second, whole=vision is None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return _build(tensors, source, path, device, dtype or _language_dtype(tensors), scan, prompt, vision, vision_heads)


def load_language_model(path) -> tuple[VisualRWKVTextConfig, dict[str, Tensor]]:
    """Sizes and tensors of a bare RWKV-5 or RWKV-6 file, or of a folder that `convert` made of one.

    Returns:
        the config, and the mapped tensors under the names of `visualrwkv.rwkv.RWKV`.
    Raises:
        InputError: no such model in the file, or tensors that do not fit (named).
    """
    path = Path(path)
    tensors = _read_folder(path)[1] if path.is_dir() else read_tensors(path)
    if _kind(tensors, path) != "language":
        raise InputError(f"{path}: holds more than a language model; load it with visualrwkv.load")
    config = text_config(tensors, str(path))
    _check_tensors(tensors, _expected(config), str(path))
    return config, tensors


def convert(src, dst) -> list[Path]:
    """A .pth file (or two) to a folder, or a folder back to .pth; every tensor keeps its bits and its dtype.

    Args:
        src: what `load_checkpoint` or `load_language_model` reads, or a folder written by `save_pretrained`.
        dst: the folder or .pth file to write. A VisualRWKV-5 is written in its two parts where the name ends in
            `_rwkv.pth` or `_visual.pth`.
    Returns:
        what was written: the folder, or the files.
    Raises:
        InputError: unusable source, or a destination that exists.
    """
    src, dst = Path(src), Path(dst)
    if src.is_dir():
        return _folder_to_files(src, dst)
    if dst.suffix == ".pth":
        raise InputError(f"{dst}: {src} is a file already; name a folder to convert it to")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InputError(f"{dst}: exists already; name a folder that does not")
    if _kind(read_tensors(src), src) == "language" and _partner(src) is None:
        config, tensors = load_language_model(src)
        config.save_pretrained(dst)
        _save_safetensors(tensors, dst / "model.safetensors")
        tokenizer_beside(src, config).save_pretrained(dst)
    else:
        model, processor = _build(*_read_parts(src), src, device="cpu", dtype=None)
        model.save_pretrained(dst, max_shard_size="4GB")
        processor.save_pretrained(dst)
    return [dst]


def read_tensors(path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, mapped into memory and never unpickled into anything else.

    Raises:
        InputError: missing, damaged or no dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        hint = "is a folder; pass it to visualrwkv.load" if path.is_dir() else "no such file; pass a .pth checkpoint"
        raise InputError(f"{path}: {hint}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():  # of unusual pickles: either they are read or the error below says it
            warnings.simplefilter("ignore", UserWarning)
            # only files in the zip format, which torch writes since 2020, can be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (*_UNREADABLE, pickle.UnpicklingError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]
        raise InputError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {reason}); is it complete? Download it again"
        ) from error
    if not isinstance(tensors, dict) or not tensors or not all(map(_is_named_tensor, tensors.items())):
        raise InputError(f"{path}: holds no dictionary of tensors; pass an official VisualRWKV or RWKV checkpoint")
    if any(tensor.dtype == torch.int8 for tensor in tensors.values()):
        raise InputError(f"{path}: holds int8 weights; pass the checkpoint that they were made of")
    return tensors


def _is_named_tensor(item) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def tokenizer_beside(path, config: VisualRWKVTextConfig):
    """The tokenizer of a file or folder: `rwkv_vocab.txt` beside or in it, otherwise the World vocabulary."""
    from visualrwkv.tokenization import VOCAB_FILE, RWKVWorldTokenizer

    path = Path(path)
    own = (path if path.is_dir() else path.parent) / VOCAB_FILE
    if own.is_file() and config.vocab_size <= IMAGE_TOKEN_ID:
        return RWKVWorldTokenizer(own)
    return RWKVWorldTokenizer()


def _build(tensors, source, path, device, dtype, scan=None, prompt=None, vision=None, vision_heads=None):
    """The model on the meta device, then its tensors put in one by one: memory never holds two sets of weights."""
    from visualrwkv.image_processing import VisualRWKVImageProcessor
    from visualrwkv.modeling import VisualRWKVForConditionalGeneration
    from visualrwkv.processing import VisualRWKVProcessor
    from visualrwkv.streaming import turn_end_ids

    text = text_config(tensors, source, "rwkv.")
    old = text.version == 5
    tokenizer = tokenizer_beside(path, text)
    config = VisualRWKVConfig(
        text_config=text,
        vision_config=vision or vision_config(tensors, source, vision_heads),
        scan=scan or ("uni" if old else "bi"),
        prompt=prompt or ("first" if old else "sandwich"),
        cls_first=old and vision is None,
        blank_image=not old and vision is None,
        projector="mlp" if "proj.0.weight" in tensors else "linear",
        image_token_id=min(tokenizer.image_token_id, text.vocab_size - 1),
    )
    if vision is not None:
        tensors = tensors | to_official(_start_vision(config), config.vision_config)
    with torch.device("meta"):
        model = VisualRWKVForConditionalGeneration(config)
    _check_tensors(tensors, to_official(model.state_dict(), config.vision_config), source)
    ours = from_official(tensors)
    del tensors
    for name in list(ours):
        ours[name] = ours[name].to(device=device, dtype=dtype if ours[name].is_floating_point() else None)
    model.load_state_dict(ours, assign=True)
    del ours
    model.vit.fill_constants()
    model.config.dtype = model.dtype
    model.generation_config.eos_token_id = turn_end_ids(tokenizer)
    processor = VisualRWKVProcessor(
        VisualRWKVImageProcessor(size=config.vision_config.image_size),
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        prompt=config.prompt,
    )
    return model.eval(), processor


def _start_vision(config: VisualRWKVConfig) -> dict[str, Tensor]:
    """A tower and a projector with random weights."""
    from visualrwkv.projector import build_projector
    from visualrwkv.vision import VisionTower

    vision = config.vision_config
    parts = {
        "vit": VisionTower(vision),
        "proj": build_projector(config.projector, vision.hidden_size, config.text_config.hidden_size),
    }
    return {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}


def _read_parts(path, second=None, whole: bool = True) -> tuple[dict[str, Tensor], str]:
    """All tensors under whole-model names, and what to call their source in messages.

    Args:
        whole: a language model alone is refused; False: all else is.
    """
    path = Path(path)
    tensors = _read_folder(path)[1] if path.is_dir() and not whole else read_tensors(path)
    kind = _kind(tensors, path)
    if not whole and kind != "language":
        raise InputError(
            f"{path}: has a tower of its own; model.vision is for a bare RWKV, model.vision=null removes it"
        )
    other = Path(second) if second is not None else _partner(path)
    source = str(path)
    if kind == "whole":
        if second is not None:
            raise InputError(f"{path}: is a whole model; a second part ({second}) does not belong to it")
    elif other is not None:
        rest = read_tensors(other)
        if {kind, _kind(rest, other)} != {"language", "visual"}:
            raise InputError(f"{path} and {other}: one must be NAME_rwkv.pth, the other NAME_visual.pth")
        language, visual = (tensors, rest) if kind == "language" else (rest, tensors)
        tensors, source = _prefixed(language) | visual, f"{path} and {other}"
    elif kind == "visual":
        raise InputError(f"{path}: holds the vision part alone; put its {_part_name(path, '_rwkv')} beside it")
    elif whole:
        raise InputError(
            f"{path}: a language model alone, it has no vision part; a VisualRWKV-5 needs its "
            f"{_part_name(path, '_visual')} beside it; to train a bare RWKV on pictures, give the file as model.from "
            "and a tower as model.vision in a recipe of `visualrwkv train`"
        )
    else:
        tensors = _prefixed(tensors)
    return {name: x for name, x in tensors.items() if not name.endswith("embeddings.position_ids")}, source


def _kind(tensors: dict[str, Tensor], path) -> str:
    """`whole`, `language` or `visual`."""
    tops = {name.partition(".")[0] for name in tensors}
    if "rwkv" in tops:
        return "whole"
    if {"emb", "blocks"} & tops:
        return "language"
    if {"vit", "proj"} & tops:
        return "visual"
    raise InputError(
        f"{path}: no VisualRWKV or RWKV checkpoint; its tensors are {', '.join(sorted(tensors)[:3])}, ... "
        f"({len(tensors)} in all)"
    )


def _partner(path: Path) -> Path | None:
    """The other part of a VisualRWKV-5 where it lies beside this one."""
    for ending in _PARTS:
        if path.stem.endswith(ending):
            other = path.with_name(_part_name(path, _PARTS[ending]))
            return other if other.is_file() else None
    return None


def _part_name(path: Path, ending: str) -> str:
    stem = path.stem
    for known in _PARTS:
        stem = stem.removesuffix(known)
    return f"{stem}{ending}{path.suffix}"


def _prefixed(language: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"rwkv.{name}": tensor for name, tensor in language.items()}


def _language_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return next(x.dtype for name, x in tensors.items() if name.startswith("rwkv.") and x.is_floating_point())


def _expected(config: VisualRWKVTextConfig) -> dict[str, Tensor]:
    from visualrwkv.rwkv import RWKV

    with torch.device("meta"):
        return RWKV(config).state_dict()


def _check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """InputError that names what is missing, unexpected or misshapen."""
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {word} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for word, names in (
            ("missing", [name for name in expected if name not in found]),
            ("unexpected", [name for name in found if name not in expected]),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise InputError(f"{source}: the tensors do not fit the model: {'; '.join(problems)}; is the file complete?")


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _read_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """config.json and all tensors of a folder in safetensors files."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        shards = ["model.safetensors"]
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        raise InputError(f"{folder}: no config.json; pass a folder written by save_pretrained or a .pth file") from None
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{folder}: config.json or the index of the weights is damaged ({error})") from error
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_tensors(folder / shard)
    return config, tensors


def _folder_to_files(src: Path, dst: Path) -> list[Path]:
    config, tensors = _read_folder(src)
    if dst.suffix != ".pth":
        raise InputError(f"{dst}: {src} is a folder; name a .pth file to convert it to")
    kind = config.get("model_type")
    if kind == VisualRWKVTextConfig.model_type:
        _check_tensors(tensors, _expected(VisualRWKVTextConfig.from_dict(config)), str(src))
        files = {dst: tensors}
    elif kind == VisualRWKVConfig.model_type:
        from visualrwkv.modeling import VisualRWKVForConditionalGeneration

        config = VisualRWKVConfig.from_dict(config)
        with torch.device("meta"):
            expected = VisualRWKVForConditionalGeneration(config).state_dict()
        _check_tensors(tensors, expected, str(src))
        official = to_official(tensors, config.vision_config)
        files = {dst: official}
        if config.text_config.version == 5 and dst.stem.endswith(tuple(_PARTS)):
            language = {name[5:]: x for name, x in official.items() if name.startswith("rwkv.")}
            visual = {name: x for name, x in official.items() if not name.startswith("rwkv.")}
            files = {dst.with_name(_part_name(dst, e)): x for e, x in (("_rwkv", language), ("_visual", visual))}
    else:
        raise InputError(f"{src}: its config.json says model_type {kind!r}; pass the folder of a VisualRWKV model")
    for file in files:
        if file.exists():
            raise InputError(f"{file}: exists already; choose another name")
    for file, content in files.items():
        partial = file.with_name(file.name + ".part")  # an interrupted run leaves no file that looks complete
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, partial)
            os.replace(partial, file)
        except (OSError, RuntimeError) as error:  # RuntimeError: how torch says that a disk is full or protected
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or one_line(error)
            raise InputError(f"{file}: cannot be written: {reason}; make room, or name another place") from None
    return list(files)
