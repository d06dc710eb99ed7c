"""The memory of the language model: a state of fixed size, however much was read."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Held while a state is read as a whole: that of a graph's memory gets a copy of its own when another thread's state
# takes its place (visualrwkv.cuda_graphs).
whole = threading.RLock()


class LayerState(NamedTuple):
    """What one layer remembers. B sequences, D channels, H heads of N channels."""

    att_shift: Tensor  # (B, D) layer-normed input of the time-mix at the last position
    wkv: Tensor  # (B, H, N, N) float32, key index before value index
    ffn_shift: Tensor  # (B, D) layer-normed input of the channel-mix at the last position


class RWKVState:
    """State of all layers for a batch of sequences; travels through `generate` as `cache`.

    66 * D * L numbers per sequence for head size 64. `forward` replaces the layers of the state it is given; use
    `clone` to keep an earlier one.

    Args:
        layers: one `LayerState` per layer.
        seen: positions consumed so far (padded ones included), equal for all sequences of the batch.
    """

    is_compileable = False  # read by transformers' generate
    is_croppable = False
    is_linear = (False,)  # `get_seq_length` counts, so generate may be given the whole history and skips what was read

    def __init__(self, layers: list[LayerState], seen: int = 0):
        self.layers = list(layers)
        self.seen = seen

    @classmethod
    def zeros(cls, config, batch_size: int, *, device=None, dtype=torch.float32) -> "RWKVState":
        """The empty memory for `config` (a VisualRWKVTextConfig); token shifts in `dtype`, WKV matrices in float32."""
        shift = torch.zeros(batch_size, config.hidden_size, device=device, dtype=dtype)
        wkv_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (batch_size, config.num_heads, config.head_size, config.head_size)
        wkv = torch.zeros(shape, device=device, dtype=wkv_dtype)
        return cls([LayerState(shift, wkv, shift) for _ in range(config.num_hidden_layers)])

    def _map(self, change) -> "RWKVState":
        with whole:
            return RWKVState([LayerState(*map(change, layer)) for layer in self.layers], self.seen)

    def clone(self) -> "RWKVState":
        return self._map(torch.clone)

    def to(self, device) -> "RWKVState":
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> "RWKVState":
        return self._map(torch.detach)

    def select(self, indices) -> "RWKVState":
        """The states of the given sequences (a list or tensor of indices), in that order, repeats allowed."""
        index = torch.as_tensor(indices, device=self.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

    @classmethod
    def concatenate(cls, states: Sequence["RWKVState"]) -> "RWKVState":
        """One batch of the sequences of several states of the same model, in their order; the opposite of `select`.

        They may have read differently much: nothing but the count depends on it, and `seen` becomes the largest.
        """
        with whole:
            columns = zip(*(state.layers for state in states), strict=True)
            layers = [LayerState(*map(torch.cat, zip(*column, strict=True))) for column in columns]
        return cls(layers, max(state.seen for state in states))

    def repeat(self, times: int) -> "RWKVState":
        """Each sequence `times` times in a row."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the beams named by `beam_idx`, in place (transformers' beam search)."""
        self.layers = self.select(beam_idx).layers

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.layers = self.repeat(repeats).layers

    @property
    def batch_size(self) -> int:
        return self.layers[0].wkv.shape[0]

    @property
    def device(self) -> torch.device:
        return self.layers[0].wkv.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def tensors(self) -> dict[str, Tensor]:
        """Flat names and contiguous tensors, ready for a safetensors file; `from_tensors` reads them back."""
        with whole:
            return {
                f"layers.{i}.{name}": getattr(layer, name).detach().cpu().clone(memory_format=torch.contiguous_format)
                for i, layer in enumerate(self.layers)
                for name in LayerState._fields
            }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], seen: int) -> "RWKVState":
        """Raises KeyError when a layer is incomplete."""
        count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
        layers = [LayerState(*(tensors[f"layers.{i}.{name}"] for name in LayerState._fields)) for i in range(count)]
        return cls(layers, seen)

    def __repr__(self) -> str:
        return f"RWKVState(layers={len(self.layers)}, batch={self.batch_size}, seen={self.seen}, bytes={self.nbytes})"
