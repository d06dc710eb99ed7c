"""What the tensors of a checkpoint say: sizes of the models, and the names that differ between files and this project.

The language model and the projector keep their released names. The tower is CLIP's under the names of transformers'
CLIPVisionModel in official files and under those of open_clip's VisionTransformer here. No tensor is transposed.
"""

import math
import re

import torch
from torch import Tensor

from visualrwkv.configuration import VisualRWKVTextConfig, VisualRWKVVisionConfig
from visualrwkv.errors import InputError

OFFICIAL, OURS = "vit.vision_model.", "vit.visual."
_WORDS = (  # CLIPVisionModel, VisionTransformer
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.patch_embedding.weight", "conv1.weight"),
    ("pre_layrnorm.", "ln_pre."),
    ("post_layernorm.", "ln_post."),
    ("encoder.layers.", "transformer.resblocks."),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
_CLIP_TENSOR = re.compile(  # a VisionTransformer with anything else is no CLIP tower
    r"class_embedding|positional_embedding|conv1\.weight|ln_(pre|post)\.(weight|bias)|"
    r"transformer\.resblocks\.\d+\.(attn\.in_proj_|attn\.out_proj\.|ln_[12]\.|mlp\.c_(fc|proj)\.)(weight|bias)"
)
_SPLIT = re.compile(rf"({re.escape(OFFICIAL)}encoder\.layers\.(\d+)\.self_attn\.)([qkv])_proj\.(weight|bias)")
_STACKED = re.compile(rf"{re.escape(OURS)}transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_QKV = ("q", "k", "v")  # the order in which open_clip stacks them


def text_config(tensors: dict[str, Tensor], source: str, prefix: str = "") -> VisualRWKVTextConfig:
    """Sizes of the language model whose tensors start with `prefix`. InputError for other models than RWKV-5 and 6."""
    first = f"{prefix}blocks.0."
    if f"{first}att.time_maa_x" in tensors or f"{first}att.time_decay_w1" in tensors:
        version = 6
    elif f"{first}att.time_mix_k" in tensors and f"{first}att.time_first" not in tensors:
        version = 5
    else:
        raise InputError(
            f"{source}: no RWKV-5 or RWKV-6 language model ({first}att.time_maa_x or time_mix_k is missing); "
            "other generations have other layers"
        )

    def shape(name: str, dimensions: int):
        return _shape(tensors, prefix + name, dimensions, source)

    vocab_size, hidden_size = shape("emb.weight", 2)
    heads, head_size = shape("blocks.0.att.time_faaaa", 2)
    ranks = {}
    if version == 6:
        ranks["time_mix_rank"] = shape("blocks.0.att.time_maa_w2", 3)[1]
        ranks["decay_rank"] = shape("blocks.0.att.time_decay_w1", 2)[1]
    return VisualRWKVTextConfig(
        version=version,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=_count(tensors, f"{prefix}blocks."),
        head_size=head_size,
        attention_size=heads * head_size,
        intermediate_size=shape("blocks.0.ffn.key.weight", 2)[0],
        **ranks,
    )


def vision_config(tensors: dict[str, Tensor], source: str, heads: int | None = None) -> VisualRWKVVisionConfig:
    """Sizes of a CLIP tower under its official names (`vit.vision_model.*`)."""
    if not any(name.startswith(OFFICIAL) for name in tensors):
        raise InputError(
            f"{source}: no CLIP tower under official names ({OFFICIAL}*); other towers cannot be built from a .pth "
            "file alone, use the folder that it was converted from"
        )
    width, _, patch, _ = _shape(tensors, f"{OFFICIAL}embeddings.patch_embedding.weight", 4, source)
    positions, _ = _shape(tensors, f"{OFFICIAL}embeddings.position_embedding.weight", 2, source)
    mlp, _ = _shape(tensors, f"{OFFICIAL}encoder.layers.0.mlp.fc1.weight", 2, source)
    layers, side = _count(tensors, f"{OFFICIAL}encoder.layers."), math.isqrt(max(0, positions - 1))
    # All CLIP towers in public have 64 channels a head; those for tests are narrower and have 4 heads.
    heads = heads or max(4, width // 64)
    if width % heads:
        raise InputError(f"{source}: {heads} attention heads do not divide the tower's width {width}; set vision_heads")
    if side * side + 1 != positions:
        raise InputError(f"{source}: {positions} position embeddings are no square of patches and a CLS feature")
    released = (width, layers, patch, side, mlp, heads) == (1024, 24, 14, 24, 4096, 16)
    return VisualRWKVVisionConfig(
        name="ViT-L-14-336-quickgelu" if released else "",
        tower={
            "image_size": side * patch,
            "layers": layers,
            "width": width,
            "head_width": width // heads,
            "mlp_ratio": mlp / width,
            "patch_size": patch,
        },
        quick_gelu=True,  # as OpenAI trained them; plain GELU would cost accuracy without any error
        image_size=side * patch,
        hidden_size=width,
        patch_grid=(side, side),
        has_cls=True,
    )


def from_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under this project's names. Those of no tower, and unknown ones, keep their names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        split = _SPLIT.fullmatch(name)
        if split is None:
            ours[_rename(name, OFFICIAL, OURS)] = tensor
        elif split[3] == "q":
            stack = [tensors[f"{split[1]}{x}_proj.{split[4]}"] for x in _QKV]
            ours[f"{OURS}transformer.resblocks.{split[2]}.attn.in_proj_{split[4]}"] = torch.cat(stack)
    return ours


def to_official(tensors: dict[str, Tensor], vision: VisualRWKVVisionConfig) -> dict[str, Tensor]:
    """Tensors under official names; a tower that official files cannot say (no CLIP ViT, or one without QuickGELU)
    keeps open_clip's names, `vit.visual.*`."""
    tower = [name[len(OURS) :] for name in tensors if name.startswith(OURS)]
    if not vision.quick_gelu or not all(_CLIP_TENSOR.fullmatch(name) for name in tower):
        return dict(tensors)
    official: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            official[_rename(name, OURS, OFFICIAL)] = tensor
            continue
        for x, part in zip(_QKV, tensor.chunk(3), strict=True):
            # a copy of its own: a saved view would drag the whole stack into the file
            official[f"{OFFICIAL}encoder.layers.{stacked[1]}.self_attn.{x}_proj.{stacked[2]}"] = part.clone()
    return official


def _rename(name: str, source: str, target: str) -> str:
    if not name.startswith(source):
        return name
    inner = name[len(source) :]
    for official, ours in _WORDS:
        inner = inner.replace(official, ours) if source == OFFICIAL else inner.replace(ours, official)
    return target + inner


def _shape(tensors, name: str, dimensions: int, source: str) -> torch.Size:
    if name not in tensors:
        raise InputError(f"{source}: tensor {name} is missing; is the file complete? Download it again")
    if tensors[name].dim() != dimensions:
        raise InputError(f"{source}: tensor {name} is {tuple(tensors[name].shape)}, it needs {dimensions} dimensions")
    return tensors[name].shape


def _count(tensors, prefix: str) -> int:
    """Number of layers: one more than the highest index behind `prefix`."""
    size = len(prefix)
    indices = [name[size:].partition(".")[0] for name in tensors if name.startswith(prefix)]
    return 1 + max((int(index) for index in indices if index.isdecimal()), default=-1)
