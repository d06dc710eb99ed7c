"""The vision-language model: one forward pass for training, evaluation, chat and `generate`.

1. The tower and the projector turn pictures into features, `num_image_tokens` each.         (images, L, D)
2. The features take the places of the placeholders among the token embeddings.              (B, T, D)
3. The language model reads the sequence and moves its state; some layers read image spans in another order.
4. Logits, and where labels are given the mean over samples of each sample's mean cross entropy.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from visualrwkv.configuration import VisualRWKVConfig
from visualrwkv.errors import InputError
from visualrwkv.ops.int8 import Int8Linear
from visualrwkv.projector import build_projector
from visualrwkv.prompt import IGNORE
from visualrwkv.rwkv import RWKV
from visualrwkv.scan import image_starts, layer_orders, pieces
from visualrwkv.state import RWKVState
from visualrwkv.vision import VisionTower, pool_grid

L2_WRAP = 1e-4  # weight of the public code's penalty on the largest logit of each position


@dataclass
class VisualRWKVOutput(ModelOutput):
    """loss: scalar or None; logits: (B, T or logits_to_keep, V); cache: the state behind the last position;
    sample_losses: (B,) float32, the mean cross entropy of each sample, when labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: RWKVState | None = None
    sample_losses: Tensor | None = None


class VisualRWKVPreTrainedModel(PreTrainedModel):
    config_class = VisualRWKVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over samples, so accumulated steps average by themselves
    _no_split_modules = ["Block"]
    prefill_chunk = 1024  # positions read at once without gradients; 0 reads any prompt at once
    _is_stateful = True  # a recurrent state cannot be rolled back: generate refuses assisted decoding

    def _init_weights(self, module):
        """Called by transformers for each module. Tower and projector start when they are built, by their libraries,
        the language model by `initialize_weights`."""


class VisualRWKVForConditionalGeneration(VisualRWKVPreTrainedModel, GenerationMixin):
    """CLIP tower `vit`, projector `proj` and language model `rwkv` (VisualRWKV, arXiv 2406.13362)."""

    def __init__(self, config: VisualRWKVConfig):
        super().__init__(config)
        self.vit = VisionTower(config.vision_config)
        self.proj = build_projector(config.projector, config.vision_config.hidden_size, config.text_config.hidden_size)
        self.rwkv = RWKV(config.text_config)
        self.post_init()
        self.generation_config.suppress_tokens = [config.image_token_id]  # a place for an image is never an answer

    @classmethod
    def from_scratch(cls, config: VisualRWKVConfig) -> "VisualRWKVForConditionalGeneration":
        """A model to train: language model by the public RWKV-LM recipe, tower and projector by their libraries."""
        return cls(config)

    @initialization.guard_torch_init_functions()
    def initialize_weights(self):
        """Called by transformers for a new model, and behind loading, where the tensors that a file held stay."""
        super().initialize_weights()
        self.rwkv.init_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, which leaves memory as it finds it where a tower has buffers that no file holds."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).vit.fill_constants()
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        return self.rwkv.emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.rwkv.emb = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.rwkv.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.rwkv.head = value

    def train(self, mode: bool = True):
        """A tower that is not trained stays in evaluation mode, whatever a trainer asks for.

        So do the batch norms of one that is: a sample's loss must not depend on its neighbours in the batch, and the
        running statistics are those of the tower's own training.
        """
        super().train(mode)
        if mode:
            trained = any(parameter.requires_grad for parameter in self.vit.parameters())
            for module in self.vit.modules():
                if not trained or isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = False
        return self

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, S, S) -> pooled tower features (images, L, vision width), before the projector."""
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.vit.parameters())
        with torch.set_grad_enabled(trained):
            features = self.vit(pixel_values.to(next(self.vit.parameters()).dtype))
        features = pool_grid(features, self.config.vision_config.patch_grid, self.config.feature_grid)
        return features.roll(self.config.patch_offset, 1)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, S, S) -> (images, num_image_tokens, D) in the embedding space of the language model.

        The result may be kept and passed to `forward` or `generate` as `image_features` when a picture is shown again.
        """
        return self.proj(self.encode_images(pixel_values).to(next(self.proj.parameters()).dtype))

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token embeddings with the image features in the placeholders' places.

        Returns:
            embeds (B, T, D) and the first positions of the images (images, 2).
        Raises:
            InputError: as many images in the prompt as in `image_features` is a must; the message has both numbers.
        """
        tokens_per_image = self.config.num_image_tokens
        is_image = input_ids == self.config.image_token_id
        starts = image_starts(is_image, tokens_per_image)
        given = 0 if image_features is None else len(image_features)
        if given != len(starts):
            raise InputError(
                f"the prompt has places for {len(starts)} images ({int(is_image.sum())} placeholders, "
                f"{tokens_per_image} each) but {given} were given; pass one image for each place"
            )
        embeds = self.rwkv.emb(input_ids)
        if given:
            features = image_features.to(embeds.dtype).reshape(-1, embeds.shape[-1])
            embeds = embeds.masked_scatter(is_image[..., None], features)
        return embeds, starts

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: RWKVState | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> VisualRWKVOutput:
        """Read a batch.

        Args:
            input_ids: (B, T); `image_token_id` stands once for each feature of an image.
            pixel_values: (images, 3, S, S), in the order of their places over the batch.
            attention_mask: (B, T) or longer (its last T columns count), 0 at padded positions, which change nothing.
            labels: (B, T), -100 where nothing is to be predicted; shifted inside.
            cache: state to continue from; it is moved, so `clone` it to keep it.
            inputs_embeds: (B, T, D) in place of `input_ids`, for text (without known image places nothing is reversed).
            image_features: (images, num_image_tokens, D) from `get_image_features`, in place of `pixel_values`.
            use_cache: return the state (default: when not training).
            logits_to_keep: compute only the last n positions' logits; 0 for all.
            return_dict: False gives a tuple.
        Raises:
            InputError: images and places, or sequences and those of the state, differ in number, or an image is cut.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("pass either input_ids or inputs_embeds")
        if pixel_values is not None and image_features is not None:
            raise InputError("pass either pixel_values or image_features")
        if input_ids is None and not (pixel_values is None and image_features is None):
            raise InputError("inputs_embeds tell no places for images; pass input_ids with them")
        starts = None
        if input_ids is not None:
            if pixel_values is not None:
                image_features = self.get_image_features(pixel_values)
            inputs_embeds, starts = self.embed(input_ids, image_features)
        layers, rows = self.config.text_config.num_hidden_layers, len(inputs_embeds)
        if cache is not None and (len(cache.layers), cache.batch_size) != (layers, rows):
            raise InputError(
                f"the state is of {cache.batch_size} sequences in {len(cache.layers)} layers, the batch of {rows} in "
                f"{layers}; `state.repeat(n)` gives n sequences the state of one"
            )
        mask = None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :].bool()
        hidden, state = self._read(inputs_embeds, cache, mask, starts, logits_to_keep)
        logits = self.rwkv.logits(hidden)

        loss = sample_losses = None
        if labels is not None:
            if logits_to_keep:
                raise InputError("labels need all logits; leave logits_to_keep at 0")
            sample_losses = per_sample_loss(logits, labels)
            loss = sample_losses.mean()
            if self.training and self.config.l2_wrap:
                loss = _L2Wrap.apply(loss, logits)
            if self.training and (_several_processes() or not loss.requires_grad):
                loss = loss + self._touch_image_path()
        if use_cache is None:
            use_cache = not self.training
        output = VisualRWKVOutput(loss, logits, state if use_cache else None, sample_losses)
        return output if return_dict is not False else output.to_tuple()

    def _touch_image_path(self):
        """0, computed from every parameter of tower and projector that learns: those without a gradient (all of them in
        a batch without pictures; the tower's final norm always) would stall the reduction between processes."""
        outside = (p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("rwkv."))
        return sum(0 * p.flatten()[:1].sum() for p in outside)

    def _read(self, embeds, state, mask, starts, keep):
        """Hidden states of the last `keep` positions (0: of all) and the state behind embeds (B, T, D).

        Without gradients a long sequence is read in pieces, none of which ends inside an image: what a layer computes
        on the way is then never larger than for one piece.
        """
        length, tokens_per_image = embeds.shape[1], self.config.num_image_tokens
        images = [] if starts is None else starts[:, 1].tolist()
        whole = torch.is_grad_enabled() or not self.prefill_chunk
        parts = []
        for begin, end in pieces(length, length if whole else self.prefill_chunk, images, tokens_per_image):
            orders = None
            inside = [n for n, first in enumerate(images) if begin <= first < end]
            if inside:
                patches = starts[inside] + starts.new_tensor([0, self.config.patch_offset - begin])
                layers = self.config.text_config.num_hidden_layers
                shape = (embeds.shape[0], end - begin)
                orders = layer_orders(self.config.scan, layers, patches, self.config.feature_grid, shape)
            part = None if mask is None else mask[:, begin:end]
            piece, state = self.rwkv(embeds[:, begin:end], state, part, orders, keep)
            parts.append(piece)
            if keep:
                parts = [torch.cat(parts, 1)[:, -keep:]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1), state

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; a model with int8 weights is refused, since nothing could read the folder."""
        if any(isinstance(module, Int8Linear) for module in self.modules()):
            raise InputError("a model loaded with quantize='int8' cannot be saved; load it without and save that")
        return super().save_pretrained(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, image_features=None, is_first_iteration=False, **kwargs
    ):
        """Images are read with the prompt, and again only where there is no state (`use_cache=False`)."""
        behind = kwargs.get("next_sequence_length")
        if is_first_iteration and behind is not None and behind < 1:  # transformers would read some of them again
            raise InputError(
                f"the state has read {kwargs['cache'].get_seq_length()} positions, but only "
                f"{input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]} were passed; pass all that "
                "it has read and at least one more, or new ids alone with an attention_mask for all"
            )
        kwargs.pop("tokenizer", None)  # which transformers hands on where `stop_strings` need it
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if image_features is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            inputs["image_features"] = image_features
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeat each sequence with all of its images and its state (beams, several answers for a prompt)."""
        if expand_size > 1 and input_ids is not None:
            per_row = (input_ids == self.config.image_token_id).sum(1) // self.config.num_image_tokens
            rows = torch.arange(int(per_row.sum()), device=input_ids.device).split(per_row.tolist())
            order = torch.cat([row.repeat(expand_size) for row in rows]) if rows else None
            images = {name: kwargs.pop(name) for name in ("pixel_values", "image_features") if name in kwargs}
            input_ids, kwargs = super()._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids, **kwargs
            )
            for name, value in images.items():
                kwargs[name] = None if value is None else value[order]
            state = kwargs.get("cache")
            if isinstance(state, RWKVState) and state.batch_size != len(input_ids):
                state.batch_repeat_interleave(expand_size)
            return input_ids, kwargs
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each sample over its own labels (VisualRWKV's training loss before the batch mean).

    Args:
        logits: (B, T, V); labels: (B, T), -100 where nothing is predicted; position t is scored on label t + 1.
    Returns:
        (B,) float32; 0 for a sample without labels.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    # Only labelled rows are scored: most positions of a visual sample are prompt.
    counted = targets != IGNORE
    losses = F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
    sums = torch.zeros(labels.shape[0], dtype=losses.dtype, device=losses.device)
    rows = counted.nonzero()[:, 0]
    return sums.index_add(0, rows, losses) / counted.sum(1).clamp(min=1)


class _L2Wrap(torch.autograd.Function):
    """Adds the gradient of L2_WRAP / 2 / (B T) * sum of squared largest logits to that of the loss.

    As in the public code the value of the loss stays as it is, and the term is not scaled by what comes from above.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, logits: Tensor) -> Tensor:
        top, index = logits.detach().max(-1, keepdim=True)
        ctx.save_for_backward(top, index)
        ctx.shape = logits.shape
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor]:
        top, index = ctx.saved_tensors
        grad = top.new_zeros(ctx.shape)
        return grad_loss, grad.scatter_(-1, index, top * (L2_WRAP / (ctx.shape[0] * ctx.shape[1])))
