"""The one description of a VisualRWKV model: language model, vision tower, projector, scan and prompt.

It is written into the checkpoint (`config.json`), so that no environment variable, path or command line flag decides
what a checkpoint means.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from visualrwkv.errors import InputError
from visualrwkv.prompt import POSITIONS
from visualrwkv.scan import SCANS

PROJECTORS = ("linear", "mlp")
IMAGE_TOKEN_ID = 65535  # beside the World vocabulary: its ids end at 65529, its embeddings have 65,536 rows


@strict
class VisualRWKVTextConfig(PreTrainedConfig):
    """Sizes of an RWKV-5 or RWKV-6 language model (Eagle and Finch, arXiv 2404.05892).

    `time_mix_rank` and `decay_rank` are the widths of RWKV-6's low-rank data-dependent token shift and decay.
    """

    model_type = "visualrwkv_text"
    base_config_key = "text_config"

    version: int = 6
    vocab_size: int = 65536
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    head_size: int = 64
    attention_size: int | None = None  # defaults to hidden_size
    intermediate_size: int | None = None  # defaults to 3.5 times hidden_size
    time_mix_rank: int = 32
    decay_rank: int = 64
    head_size_divisor: int = 8  # the group norm after the recurrence has epsilon 1e-5 * divisor**2
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        self.attention_size = self.attention_size or self.hidden_size
        self.intermediate_size = self.intermediate_size or int(self.hidden_size * 3.5) // 32 * 32
        if self.version not in (5, 6):
            raise InputError(f"text_config.version is {self.version}; RWKV-5 and RWKV-6 are supported (use 5 or 6)")
        if self.attention_size % self.head_size:
            raise InputError(
                f"text_config.attention_size {self.attention_size} is not a multiple of head_size {self.head_size}"
            )
        super().__post_init__(**kwargs)

    @property
    def num_heads(self) -> int:
        return self.attention_size // self.head_size

    @property
    def state_size(self) -> int:
        """Numbers in the state of one sequence: the WKV matrices and two token-shift vectors per layer."""
        return self.num_hidden_layers * (self.attention_size * self.head_size + 2 * self.hidden_size)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of the state: matrices in float32, token-shift vectors in the model's dtype of `itemsize` bytes."""
        shifts = 2 * self.hidden_size * self.num_hidden_layers
        return 4 * (self.state_size - shifts) + itemsize * shifts


@strict
class VisualRWKVVisionConfig(PreTrainedConfig):
    """An open_clip vision tower, self-contained: no registry or network is needed to build it again.

    `tower` is open_clip's `vision_cfg`; `patch_grid`, `hidden_size` and `has_cls` are what the tower gives
    (see `visualrwkv.vision.describe_tower`), kept here so that prompts can be built without building the tower.
    """

    model_type = "visualrwkv_vision"
    base_config_key = "vision_config"

    name: str = ""
    tower: dict | None = None
    embed_dim: int = 768
    quick_gelu: bool = False
    image_size: int = 336
    hidden_size: int = 1024
    patch_grid: list[int] | tuple[int, int] = (24, 24)
    has_cls: bool = True

    def __post_init__(self, **kwargs):
        if self.tower is None:  # the tower of the released checkpoints: openai/clip-vit-large-patch14-336
            self.name = self.name or "ViT-L-14-336-quickgelu"
            self.tower = {"image_size": 336, "layers": 24, "width": 1024, "patch_size": 14}
            self.quick_gelu = True
        self.patch_grid = list(self.patch_grid)
        super().__post_init__(**kwargs)


@strict
class VisualRWKVConfig(PreTrainedConfig):
    """A whole vision-language model.

    Args:
        scan: order in which the layers read the patches of an image, one of `SCANS`.
        prompt: where the image stands in the user's turn, one of `POSITIONS`.
        grid_size: pooling of the patches: -1 all, 0 the CLS feature alone, g >= 1 an average grid of g x g.
        projector: `linear` (released checkpoints) or `mlp` (layer norm, two layers, GELU).
        image_token_id: placeholder, repeated once per image feature.
        cls_first: the CLS feature stands before the patches (VisualRWKV-5), not behind them.
        l2_wrap: add the public code's penalty on the largest logit to the gradients of training.
        blank_image: benchmarks show an image of zero features with questions that have none, as VisualRWKV-6 does.
    """

    model_type = "visualrwkv"
    sub_configs = {"text_config": VisualRWKVTextConfig, "vision_config": VisualRWKVVisionConfig}
    keys_to_ignore_at_inference = ["cache", "sample_losses"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    scan: str = "bi"
    prompt: str = "sandwich"
    grid_size: int = -1
    projector: str = "linear"
    image_token_id: int = IMAGE_TOKEN_ID
    cls_first: bool = False
    l2_wrap: bool = False
    blank_image: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = VisualRWKVTextConfig(**(self.text_config or {}))
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = VisualRWKVVisionConfig(**(self.vision_config or {}))
        for name, value, known in (
            ("scan", self.scan, SCANS),
            ("prompt", self.prompt, POSITIONS),
            ("projector", self.projector, PROJECTORS),
        ):
            if value not in known:
                raise InputError(f"{name} is {value!r}; use one of {', '.join(known)}")
        if not 0 < self.image_token_id < self.text_config.vocab_size:
            raise InputError(
                f"image_token_id {self.image_token_id} is outside the vocabulary of {self.text_config.vocab_size} rows"
            )
        if self.num_image_tokens < 1:  # feature_grid itself refuses a grid_size that the tower cannot give
            raise InputError("the tower gives no features")
        super().__post_init__(**kwargs)

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Rows and columns of patch features after pooling; (0, 0) when only the CLS feature is used."""
        rows, columns = self.vision_config.patch_grid
        if self.grid_size == -1:
            return rows, columns
        if self.grid_size == 0 and self.vision_config.has_cls:
            return 0, 0
        if self.grid_size >= 1 and rows % self.grid_size == 0 and columns % self.grid_size == 0:
            return self.grid_size, self.grid_size
        raise InputError(
            f"grid_size {self.grid_size} does not fit a tower of {rows}x{columns} patches "
            f"{'with' if self.vision_config.has_cls else 'without'} a CLS feature; use -1 or a divisor of both sides"
        )

    @property
    def num_image_tokens(self) -> int:
        """Features of one image: pooled patches row by row, and the CLS feature where the tower has one."""
        rows, columns = self.feature_grid
        return rows * columns + int(self.vision_config.has_cls)

    @property
    def patch_offset(self) -> int:
        """Place of the first patch among the features of an image."""
        return int(self.cls_first and self.vision_config.has_cls)
