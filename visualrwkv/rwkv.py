"""RWKV-5 and RWKV-6 language models (Eagle and Finch, arXiv 2404.05892), with the released parameter names.

A block is a time-mix (the WKV recurrence over positions) and a channel-mix (a gated feed-forward layer). Both look one
position back through the token shift. Everything a layer needs of the past stands in its `LayerState`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.initialization import copy_
from transformers.modeling_layers import GradientCheckpointingLayer

from visualrwkv import cuda_graphs, inference
from visualrwkv.configuration import VisualRWKVTextConfig
from visualrwkv.ops import wkv6
from visualrwkv.ops.linear import Linear, linear
from visualrwkv.scan import Order
from visualrwkv.state import LayerState, RWKVState


class Padding:
    """Which positions of a batch are real, and where each position finds the real one before it.

    A padded position must leave every state as it was, wherever it stands: left, right or between.
    """

    def __init__(self, mask: Tensor):
        """mask: (B, T) bool, True at real positions."""
        positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        last_real = torch.where(mask, positions, -1).cummax(1).values  # (B, T), -1 before the first real position
        first = torch.full_like(last_real[:, :1], -1)
        self.real = mask[..., None]  # (B, T, 1)
        self.previous = torch.cat([first, last_real[:, :-1]], 1)[..., None] + 1  # index into [shift state, z]
        self.last = last_real[:, -1:, None] + 1


def token_shift(z: Tensor, shift: Tensor, padding: Padding | None) -> tuple[Tensor, Tensor]:
    """The layer-normed input of the position before, and the last one as the next state.

    Args:
        z: (B, T, D); shift: (B, D) from the state; padding: None when every position is real.
    Returns:
        previous (B, T, D), new shift (B, D).
    """
    if padding is None:
        if z.shape[1] == 1:
            return shift[:, None].to(z.dtype), z[:, -1]
        # A copy, since a view would keep the whole of z alive for as long as the state is kept.
        return torch.cat([shift[:, None].to(z.dtype), z[:, :-1]], 1), z[:, -1].clone()
    history = torch.cat([shift[:, None].to(z.dtype), z], 1)  # (B, 1 + T, D)
    size = z.shape[-1]
    previous = history.gather(1, padding.previous.expand(-1, -1, size))
    return previous, history.gather(1, padding.last.expand(-1, -1, size))[:, 0]


class TimeMix(nn.Module):
    """Parts common to both versions: projections, WKV, group norm per head, gate, output."""

    def __init__(self, config: VisualRWKVTextConfig, layer_id: int):
        super().__init__()
        hidden, attention = config.hidden_size, config.attention_size
        self.layer_id = layer_id
        self.num_layers = config.num_hidden_layers
        self.num_heads, self.head_size = config.num_heads, config.head_size
        self.receptance = Linear(hidden, attention, bias=False)
        self.key = Linear(hidden, attention, bias=False)
        self.value = Linear(hidden, attention, bias=False)
        self.gate = Linear(hidden, attention, bias=False)
        self.output = Linear(attention, hidden, bias=False)
        # Both versions divide the head output by the divisor before a norm of epsilon 1e-5; a norm forgets the factor.
        self.ln_x = nn.GroupNorm(self.num_heads, attention, eps=1e-5 * config.head_size_divisor**2)
        self.time_faaaa = nn.Parameter(torch.empty(self.num_heads, self.head_size))  # the bonus u

    def mix(self, z: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The inputs of decay, key, value, receptance and gate: (B, T, D) each."""
        raise TypeError("use TimeMix5 or TimeMix6")

    def decay(self, xw: Tensor) -> Tensor:
        """The raw decay w; the state decays by exp(-exp(w)). Broadcastable to (B, T, attention_size)."""
        raise TypeError("use TimeMix5 or TimeMix6")

    def forward(self, z: Tensor, state: LayerState, padding: Padding | None) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, T, D) -> y (B, T, D), new token shift (B, D), new WKV matrices (B, H, N, N)."""
        batch, length, _ = z.shape
        heads = (batch, length, self.num_heads, self.head_size)
        previous, shift = token_shift(z, state.att_shift, padding)
        xw, xk, xv, xr, xg = self.mix(z, previous)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        if r.dtype == torch.float16:  # y is in r's dtype; sums of key times value leave the range of float16 (65,504)
            r = r.float()
        w = self.decay(xw).expand(batch, length, -1)
        if padding is not None:  # nothing is written and nothing decays: exp(-exp(-inf)) = 1
            k = torch.where(padding.real, k, 0)
            w = torch.where(padding.real, w, -torch.inf)
        y, wkv = wkv6(r.view(heads), k.view(heads), v.view(heads), w.reshape(heads), self.time_faaaa, state.wkv)
        y = self._norm_heads(y.reshape(batch * length, -1), z.dtype).view(batch, length, -1)
        return self.output(y * F.silu(self.gate(xg))), shift, wkv

    def _norm_heads(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Group norm per head of y (rows, attention_size), in the wider one of y's dtype and `dtype`."""
        wide, norm = torch.promote_types(y.dtype, dtype), self.ln_x
        if wide == dtype:
            return norm(y.to(dtype))
        weight, bias = norm.weight.to(wide), norm.bias.to(wide)
        return F.group_norm(y, norm.num_groups, weight, bias, norm.eps).to(dtype)

    def init_weights(self) -> None:
        """Starting values of the public RWKV-LM recipe: decays spread over the channels, outputs start at zero."""
        depth = self.layer_id / max(1, self.num_layers - 1)  # 0 in the first layer, 1 in the last
        size = self.receptance.out_features
        channel = torch.arange(size) / max(1, size - 1)
        zigzag = (torch.arange(size) + 1) % 3 - 1
        copy_(self.time_faaaa, (depth * (1 - channel) + 0.1 * zigzag).view_as(self.time_faaaa))
        copy_(self.time_decay, (-6 + 5 * channel ** (0.7 + 1.3 * depth)).view_as(self.time_decay))
        for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0), ("gate", 0.1)):
            nn.init.orthogonal_(getattr(self, name).weight, gain)
        nn.init.zeros_(self.output.weight)

    def _mix_ratio(self, power: float = 1.0) -> Tensor:
        """Share of the present position per channel at the start; later layers look back less."""
        hidden = self.receptance.in_features
        return (torch.arange(hidden) / hidden) ** (power * (1 - self.layer_id / self.num_layers))


class TimeMix6(TimeMix):
    """RWKV-6: token shift and decay depend on the data through low-rank maps (arXiv 2404.05892, equations 11 to 20)."""

    MIXED = ("w", "k", "v", "r", "g")  # the order of time_maa_w1 and time_maa_w2

    def __init__(self, config: VisualRWKVTextConfig, layer_id: int):
        super().__init__(config, layer_id)
        hidden, attention = config.hidden_size, config.attention_size
        for name in ("x", *self.MIXED):
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, hidden)))
        self.time_maa_w1 = nn.Parameter(torch.empty(hidden, 5 * config.time_mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.time_mix_rank, hidden))
        self.time_decay = nn.Parameter(torch.empty(1, 1, attention))
        self.time_decay_w1 = nn.Parameter(torch.empty(hidden, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, attention))

    def mix(self, z, previous):
        batch, length, size = z.shape
        back = previous - z
        low = torch.tanh(linear(z + back * self.time_maa_x, self.time_maa_w1.t()))  # (B, T, 5 R)
        low = low.view(batch * length, 5, -1).transpose(0, 1)  # (5, B T, R)
        shares = torch.bmm(low, self.time_maa_w2).view(5, batch, length, size)
        return tuple(
            torch.addcmul(z, back, getattr(self, f"time_maa_{name}") + share)
            for name, share in zip(self.MIXED, shares, strict=True)
        )

    def decay(self, xw):
        return self.time_decay + linear(torch.tanh(linear(xw, self.time_decay_w1.t())), self.time_decay_w2.t())

    def init_weights(self):
        super().init_weights()
        depth = self.layer_id / max(1, self.num_layers - 1)
        for name in ("x", *self.MIXED):
            power, lift = 0.5 if name in "rg" else 1, 0.3 * depth if name == "v" else 0
            copy_(getattr(self, f"time_maa_{name}"), 1 - self._mix_ratio(power) - lift)
        for name in ("time_maa", "time_decay"):
            nn.init.zeros_(getattr(self, f"{name}_w1"))
            nn.init.uniform_(getattr(self, f"{name}_w2"), -0.01, 0.01)


class TimeMix5(TimeMix):
    """RWKV-5: fixed token shift, a decay per channel that does not depend on the position."""

    def __init__(self, config: VisualRWKVTextConfig, layer_id: int):
        super().__init__(config, layer_id)
        for name in ("k", "v", "r", "g"):
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.empty(1, 1, config.hidden_size)))
        self.time_decay = nn.Parameter(torch.empty(self.num_heads, self.head_size))

    def mix(self, z, previous):
        xk, xv, xr, xg = (
            z * share + previous * (1 - share)
            for share in (self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g)
        )
        return z, xk, xv, xr, xg

    def decay(self, xw):
        return self.time_decay.view(1, 1, -1)

    def init_weights(self):
        super().init_weights()
        lift = 0.3 * self.layer_id / max(1, self.num_layers - 1)
        for name, power, extra in (("k", 1, 0), ("v", 1, lift), ("r", 0.5, 0), ("g", 0.5, 0)):
            copy_(getattr(self, f"time_mix_{name}"), self._mix_ratio(power) + extra)


class ChannelMix(nn.Module):
    """Gated feed-forward layer with squared ReLU; both versions differ in the name and sense of the mixing ratios."""

    def __init__(self, config: VisualRWKVTextConfig, layer_id: int):
        super().__init__()
        self.version = config.version
        self.layer_id, self.num_layers = layer_id, config.num_hidden_layers
        for name in ("k", "r"):
            setattr(self, self._ratio(name), nn.Parameter(torch.empty(1, 1, config.hidden_size)))
        self.key = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.receptance = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def _ratio(self, name: str) -> str:
        return f"time_maa_{name}" if self.version == 6 else f"time_mix_{name}"

    def _mixed(self, name: str, z: Tensor, previous: Tensor) -> Tensor:
        share = getattr(self, self._ratio(name))
        if self.version == 6:
            return torch.addcmul(z, previous - z, share)
        return z * share + previous * (1 - share)

    def forward(self, z: Tensor, shift: Tensor, padding: Padding | None) -> tuple[Tensor, Tensor]:
        """z (B, T, D), shift (B, D) -> y (B, T, D), new shift (B, D)."""
        previous, shift = token_shift(z, shift, padding)
        key = F.relu(self.key(self._mixed("k", z, previous)), inplace=True).square()
        return torch.sigmoid(self.receptance(self._mixed("r", z, previous))) * self.value(key), shift

    def init_weights(self) -> None:
        hidden = self.key.in_features
        ratio = (torch.arange(hidden) / hidden) ** (1 - self.layer_id / self.num_layers)
        for name in ("k", "r"):
            copy_(getattr(self, self._ratio(name)), 1 - ratio if self.version == 6 else ratio)
        nn.init.orthogonal_(self.key.weight, max(1.0, math.sqrt(self.key.out_features / hidden)))
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)


class Block(GradientCheckpointingLayer):
    """x + time-mix(ln1 x), then x + channel-mix(ln2 x); block 0 also owns ln0, the norm of the embeddings."""

    def __init__(self, config: VisualRWKVTextConfig, layer_id: int):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        if layer_id == 0:
            self.ln0 = nn.LayerNorm(size, eps=eps)
        self.ln1 = nn.LayerNorm(size, eps=eps)
        self.ln2 = nn.LayerNorm(size, eps=eps)
        self.att = (TimeMix6 if config.version == 6 else TimeMix5)(config, layer_id)
        self.ffn = ChannelMix(config, layer_id)

    def forward(self, x: Tensor, state: LayerState, padding: Padding | None) -> tuple[Tensor, LayerState]:
        """x (B, T, D), in the reading order of this layer."""
        y, att_shift, wkv = self.att(self.ln1(x), state, padding)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, padding)
        return x + y, LayerState(att_shift, wkv, ffn_shift)


class RWKV(nn.Module):
    """The language model: `emb`, `blocks`, `ln_out`, `head`."""

    def __init__(self, config: VisualRWKVTextConfig):
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.ln_out = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        embeds: Tensor,
        state: RWKVState | None = None,
        mask: Tensor | None = None,
        orders: list[Order | None] | None = None,
        keep: int = 0,
    ) -> tuple[Tensor, RWKVState]:
        """Read a piece of text and images and move the state past it.

        Args:
            embeds: (B, T, D) embeddings before ln0.
            state: where to continue from; its layers are replaced. None starts with an empty memory.
            mask: (B, T) bool, False at padded positions, which change nothing. None when there are none.
            orders: per layer the order in which image spans are read (see `scan.layer_orders`).
            keep: how many of the last positions are wanted; 0 for all.
        Returns:
            hidden (B, keep or T, D) after `ln_out`, in natural order, and the state.
        """
        if state is None:
            state = RWKVState.zeros(self.config, embeds.shape[0], device=embeds.device, dtype=embeds.dtype)
        if mask is not None and bool(mask.all()):
            mask = None
        if embeds.is_cuda:
            single = embeds.shape[1] == 1 and mask is None and not orders
            hidden = cuda_graphs.step(self, embeds, state) if single else None
            if hidden is None:
                cuda_graphs.leave(self, state)
        else:
            hidden = inference.read(self, embeds, state, mask, orders, keep)
        if hidden is not None:
            state.seen += embeds.shape[1]
            return hidden, state
        padding = None if mask is None else Padding(mask)
        x = self.blocks[0].ln0(embeds)
        for i, block in enumerate(self.blocks):
            order = orders[i] if orders else None
            if order is not None:
                x = x.gather(1, order.read[..., None].expand_as(x))
            x, state.layers[i] = block(x, state.layers[i], padding)
            if order is not None:
                x = x.gather(1, order.restore[..., None].expand_as(x))
        state.seen += embeds.shape[1]
        return self.ln_out(x[:, -keep:]), state

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) of `forward` -> (B, T, V)."""
        return inference.project(self.head, hidden)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting values of the public RWKV-LM recipe for training from scratch."""
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)  # ln0 brings it to unit scale; small values move fast
        vocab, size = self.head.weight.shape
        nn.init.orthogonal_(self.head.weight, 0.5 * math.sqrt(max(1.0, vocab / size)))
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                module.reset_parameters()
            elif isinstance(module, (TimeMix, ChannelMix)):
                module.init_weights()
