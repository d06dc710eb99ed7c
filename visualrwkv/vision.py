"""Vision towers from open_clip, as the language model reads them: patch features before the final norm, CLS last."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visualrwkv.configuration import VisualRWKVVisionConfig
from visualrwkv.errors import InputError, one_line
from visualrwkv.ops.linear import Linear
from visualrwkv.ops.wide import WideProducts, slow_in_bfloat16


class VisionTower(nn.Module):
    """An open_clip visual tower of any family (`visual`), reduced to what gives patch features.

    Args:
        config: its `tower` is open_clip's vision_cfg.
    """

    def __init__(self, config: VisualRWKVVisionConfig):
        super().__init__()
        self.config = config
        self.visual = _build_visual(config.tower, config.embed_dim, config.quick_gelu)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, S, S) -> (images, patches [+ 1], width): patches row by row, then the CLS feature if any."""
        # Convolutions are faster on pixels that lie together; the order of the values in memory is all that changes.
        pixels = pixel_values.contiguous(memory_format=torch.channels_last)
        free = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        wide = free and pixels.is_cpu and pixels.dtype == torch.bfloat16 and slow_in_bfloat16()
        with WideProducts() if wide else nullcontext():
            patches, cls = _features(self.visual, pixels)
        return patches if cls is None else torch.cat([patches, cls], 1)

    def fill_constants(self) -> None:
        """Compute the buffers that no file holds: those that some towers, such as EVA02, make when they are built.

        For a tower that was built on the meta device and then given its weights; in the weights' dtype.
        """
        saved = self.state_dict()
        missing = [name for name, _ in self.named_buffers() if name not in saved]
        if not missing:
            return
        weight, built = next(self.parameters()), dict(VisionTower(self.config).named_buffers())
        for name in missing:
            path, _, leaf = name.rpartition(".")
            buffers, value = self.get_submodule(path)._buffers, built[name]
            device = weight.device if buffers[leaf].is_meta else buffers[leaf].device
            buffers[leaf] = value.to(device, weight.dtype if value.is_floating_point() else None)


def pool_grid(features: Tensor, patch_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Average the patches down to a grid; the CLS feature behind them stays.

    Args:
        features: (images, patches [+ 1], width); patch_grid: rows and columns of the tower;
        grid: rows and columns wanted, each a divisor; (0, 0) drops the patches.
    """
    rows, columns = patch_grid
    patches, cls = features[:, : rows * columns], features[:, rows * columns :]
    if tuple(grid) == (rows, columns):
        return features
    if grid[0] == 0:
        return cls
    high, wide = rows // grid[0], columns // grid[1]
    patches = patches.unflatten(1, (grid[0], high, grid[1], wide)).mean((2, 4)).flatten(1, 2)
    return torch.cat([patches, cls], 1)


def _build_visual(tower: dict, embed_dim: int, quick_gelu: bool) -> nn.Module:
    """The visual half of an open_clip model alone: its text half would double the memory for nothing."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    register_towers()
    fields = dict(tower)
    fields["timm_model_pretrained"] = False  # weights come from the checkpoint
    visual = _build_vision_tower(embed_dim, CLIPVisionCfg(**fields), quick_gelu)
    if getattr(visual, "proj", None) is not None:
        visual.proj = None  # the joint space of CLIP is not used
    if tower.get("timm_model_name"):
        visual.head = nn.Sequential()
    if getattr(visual, "attnpool", None) is not None:  # ModifiedResNet
        visual.attnpool = nn.Identity()
    for module in visual.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return visual


def _features(visual: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Patch features (n, patches, width) and the CLS feature (n, 1, width) or None, before the final norm."""
    from inspect import signature

    options = {"indices": 1, "intermediates_only": True, "normalize_intermediates": False}
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:  # timm: transformers know prefix tokens, convolutional networks do not
        by_token = "return_prefix_tokens" in signature(trunk.forward_intermediates).parameters
    else:
        by_token = not hasattr(visual, "attnpool")
    if by_token:
        options["output_extra_tokens"] = True
    out = visual.forward_intermediates(pixels, output_fmt="NLC" if by_token else "NCHW", **options)
    patches = out["image_intermediates"][-1]
    if patches.ndim == 4:
        patches = patches.flatten(2).transpose(1, 2)
    prefix = out.get("image_intermediates_prefix")
    cls = prefix[-1][:, :1] if prefix and prefix[-1] is not None and prefix[-1].shape[1] else None
    return patches, cls


def describe_tower(tower: dict, embed_dim: int, quick_gelu: bool = False, name: str = "") -> VisualRWKVVisionConfig:
    """A complete config for an open_clip vision_cfg: what the tower gives is read off a run on the meta device.

    Raises:
        InputError: the tower cannot be built, or its patches do not form a square grid.
    """
    size = tower.get("image_size", 224)
    size = size if isinstance(size, int) else size[0]
    try:
        with torch.device("meta"), torch.no_grad():
            visual = _build_visual(tower, embed_dim, quick_gelu)
            patches, cls = _features(visual.eval(), torch.empty(1, 3, size, size))
    except (AssertionError, RuntimeError, TypeError) as error:  # how the libraries refuse sizes that do not fit
        raise InputError(f"vision tower {name or tower}: {one_line(error)}") from error
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise InputError(f"vision tower {name or tower}: {patches.shape[1]} patches do not form a square grid")
    return VisualRWKVVisionConfig(
        name=name,
        tower=dict(tower),
        embed_dim=embed_dim,
        quick_gelu=quick_gelu,
        image_size=size,
        hidden_size=patches.shape[2],
        patch_grid=(side, side),
        has_cls=cls is not None,
    )


def tower_config(name: str, pretrained: str | None = None) -> VisualRWKVVisionConfig:
    """The config of an open_clip model by name, for example `ViT-L-14-336-quickgelu` or `ViT-B-16-SigLIP`.

    OpenAI's weights were trained with QuickGELU; plain GELU costs them accuracy without any error, so the tag or name
    decides, never a default.

    Raises:
        InputError: open_clip does not know the name.
    """
    import open_clip

    model = open_clip.get_model_config(name)
    if model is None:
        raise InputError(f"vision tower {name!r} is not known to open_clip; open_clip.list_models() lists the names")
    quick_gelu = bool(model.get("quick_gelu", False)) or pretrained == "openai"
    return describe_tower(model["vision_cfg"], model["embed_dim"], quick_gelu, name)


def load_tower(name: str, pretrained: str | None = None) -> VisionTower:
    """A tower by open_clip name, with weights from a tag of open_clip's registry or a local file.

    Raises:
        InputError: unknown name or tag, or weights that do not fit.
    """
    config = tower_config(name, pretrained)
    tower = VisionTower(config)
    if pretrained is not None:
        from pickle import UnpicklingError

        import open_clip
        from safetensors import SafetensorError

        try:
            model = open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=config.quick_gelu)
        except (RuntimeError, OSError, ValueError, EOFError, LookupError, UnpicklingError, SafetensorError) as error:
            raise InputError(f"vision tower {name!r} with weights {pretrained!r}: {error}".splitlines()[0]) from error
        source = model.visual.state_dict()
        tower.visual.load_state_dict({key: source[key] for key in tower.visual.state_dict()})
    return tower


class _Convolutions(nn.Sequential):
    """Convolutions, most of them with a batch norm and SiLU behind them.

    Without gradients a norm becomes part of its convolution, which saves a walk over all pixels. The folded weights are
    made anew each time, so they are never out of date; for fewer than `FOLDED_FROM` pictures that would cost more than
    it saves.
    """

    FOLDED_FROM = 4

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or len(x) < self.FOLDED_FROM:
            return super().forward(x)
        layers = deque(self)
        while layers:
            layer = layers.popleft()
            if layers and isinstance(layers[0], nn.BatchNorm2d):
                layer, _ = _folded(layer, layers.popleft()), layers.popleft()
                x = F.silu(layer(x), inplace=True)
            else:
                x = layer(x)
        return x


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """A convolution without bias and the norm behind it, in evaluation mode, as one convolution."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    return lambda x: F.conv2d(x, weight, bias, conv.stride, conv.padding)


class _ResidualConv(_Convolutions):
    def forward(self, x):
        return x + super().forward(x)


class _PatchMLP(nn.Module):
    """A transformer block without attention: every patch keeps to its own place.

    In a tower of a few million parameters that is trained for minutes, attention under average pooling spreads one
    global summary over all patches, and the language model finds nothing at the place where an object lies.
    """

    def __init__(self, dim: int, mlp_ratio: float = 2.0, norm_layer=nn.LayerNorm, act_layer=nn.GELU, **_):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm = norm_layer(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), act_layer(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, **_) -> Tensor:
        return x + self.mlp(self.norm(x))


def _conv_stem(in_chans: int, embed_dim: int) -> _Convolutions:
    """16-fold reduction in four strided convolutions, with residual ones between them.

    Batch norm, since norms over a picture's own pixels make the colour of an object depend on its background.
    """

    def layer(source, target, stride):
        return nn.Conv2d(source, target, 3, stride, 1, bias=False), nn.BatchNorm2d(target), nn.SiLU()

    def stage(source, target, residual):
        return [*layer(source, target, 2), *(_ResidualConv(*layer(target, target, 1)) for _ in range(residual))]

    return _Convolutions(
        *stage(in_chans, 32, 0),
        *stage(32, 64, 0),
        *stage(64, 128, 2),
        *stage(128, embed_dim, 2),
        nn.Conv2d(embed_dim, embed_dim, 1),
    )


def register_towers() -> None:
    """Make the embedded model's tower, `visualrwkv_tiny_convstem`, known to timm (and so to open_clip)."""
    from timm.layers import PatchEmbed, build_sincos2d_pos_embed
    from timm.models import VisionTransformer, build_model_with_cfg, is_model, register_model, vision_transformer

    if is_model("visualrwkv_tiny_convstem"):
        return

    class ConvPatchEmbed(PatchEmbed):
        def __init__(self, in_chans=3, embed_dim=192, **options):
            super().__init__(in_chans=in_chans, embed_dim=embed_dim, **options)
            self.proj = _conv_stem(in_chans, embed_dim)

    def visualrwkv_tiny_convstem(pretrained=False, **options):
        sizes = {"img_size": 128, "patch_size": 16, "embed_dim": 192, "depth": 2, "mlp_ratio": 2.0}
        parts = {"class_token": False, "global_pool": "avg", "embed_layer": ConvPatchEmbed, "block_fn": _PatchMLP}
        options["pretrained_cfg"] = {"input_size": (3, 128, 128)}  # there are no weights to fetch
        tower = build_model_with_cfg(
            VisionTransformer, "visualrwkv_tiny_convstem", False, **{**sizes, **parts, **options}
        )
        # Captions of single patches teach nothing about places, and small embeddings stay small: a language model then
        # finds what lies in a picture but not where.
        places = build_sincos2d_pos_embed(tower.patch_embed.grid_size, tower.embed_dim)
        with torch.no_grad():
            tower.pos_embed.copy_(places)
        return tower

    visualrwkv_tiny_convstem.__module__ = vision_transformer.__name__  # timm groups its registry by module
    register_model(visualrwkv_tiny_convstem)
