"""The RWKV-6 recurrence in chunks: matrix products within and between chunks, with an explicit backward.

Within a chunk of L tokens let P_t be the product of the decays of tokens 0..t-1 (per key channel) and S the state
before the chunk. Then, with o the product per channel,

    y_t = sum_{j<t} A_tj v_j + A_tt v_t + (r_t o P_t) S           A_tj = sum_i r_ti k_ji P_ti / P_{j+1}i
    S'  = P_L o S + sum_j (k_j o P_L / P_{j+1}) v_j^T             A_tt = sum_i r_ti u_i k_ti

Every ratio is a product of decays, hence <= 1 and harmless. Only the matrix product that yields A has to split it, into
the row factor r_t o P_t and the column factor k_j / P_{j+1}, which is sound while P_L is well within the exponent
range. A channel of a chunk where it is not (`_LIMIT`) is zeroed in that matrix product, and its share of A is added
from running products of its decays (`_Strong`), so no decay is ever clamped.

The gradient of the log decay needs no N x N work: for the state S_t before token t and its gradient G_t, the channel
sums D_t = sum_j (G_t o S_t) obey D_t = dlw_t + r_t o dr_t and D_{t+1} = dlw_t + k_t o dk_t (without the bonus terms),
so that dlw is a running sum, anchored now and then in the states. It is a difference of sums: a strong decay, whose
gradient is much smaller than these sums, is left to `_Strong` too, which adds only what passes through the token.

Derivation: Gated Linear Attention (arXiv 2312.06635), section 4, and Eagle and Finch (arXiv 2404.05892).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visualrwkv.ops.reference import check_arguments, compute_dtype, wkv6_reference

# Tokens per chunk: long ones are faster unless more than a few channels decay too much in them for the matrix product.
_LONG, _SHORT = 32, 16
# Raw decay at which a long chunk reaches _LIMIT, 32 exp(0.3) = -log(1e-19), and the share of w that may lie above it.
_STRONG_DECAY, _STRONG_SHARE = 0.3, 0.01
# Rows (batch x heads x tokens) handled at once on a CPU: few enough that a panel's matrices stay in the cache.
_PANEL = 2048
# Total decay of a chunk down to which the matrix product is used, per dtype: half of the exponent range, so that
# k_j / P_{j+1} does not overflow, nor r_t o P_t underflow, on inputs and gradients of ordinary size.
_LIMIT = {torch.float32: 1e-19, torch.float64: 1e-150}
# Log decay of a single token down to which its gradient is taken from the running sum: that sum's rounding error is
# multiplied by the log decay.
_GRADIENT_LIMIT = -6.0
# Tokens over which the running sum may go on from chunk to chunk before it is anchored anew in the states.
_CHAINED = 128
# Elements of the (entries, L, L) tensors of the exact path at once.
_EXACT_ELEMENTS = 1 << 18


def wkv6_chunked(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel WKV operator of RWKV-6; arguments, results and errors as `wkv6_reference`.

    Gradients flow to r, k, v, w, u and the initial state, from both y and the final state; not twice differentiable.
    """
    check_arguments(r, k, v, w, u, state)
    if r.shape[0] == 0:  # no sequence, nothing to divide
        return wkv6_reference(r, k, v, w, u, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, k, v, w, u, state)):
        return _ChunkedWKV6.apply(r, k, v, w, u, state)
    with torch.autocast(r.device.type, enabled=False):
        y, final, _, _ = _forward(r, k, v, w, u, state, _chunk_length(w), keep=False)
    return y, final


class _ChunkedWKV6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, w, u, state):
        ctx.set_materialize_grads(False)
        with torch.autocast(r.device.type, enabled=False):
            ctx.chunk_length = _chunk_length(w)
            y, final, states, scores = _forward(r, k, v, w, u, state, ctx.chunk_length, keep=True)
        ctx.save_for_backward(r, k, v, w, u, states, scores)
        ctx.state_dtype = None if state is None else state.dtype
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        if dy is None and dfinal is None:
            return None, None, None, None, None, None
        r, k, v, w, u, states, scores = ctx.saved_tensors
        with torch.autocast(r.device.type, enabled=False):
            dr, dk, dv, dw, du, dstate = _backward(r, k, v, w, u, states, scores, dy, dfinal, ctx.chunk_length)
        # A copy of its own: dstate is a view into a larger buffer.
        dstate = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype, copy=True)
        return dr, dk, dv, dw, du, dstate


def _chunk_length(w: Tensor) -> int:
    """Tokens per chunk that suit w (B, T, H, N), from a sample of it; a matter of speed alone."""
    some = w[:, ::4]
    strong = int(torch.count_nonzero(some > _STRONG_DECAY))
    return _LONG if strong <= _STRONG_SHARE * some.numel() else _SHORT


def _panels(w: Tensor, length: int) -> list[tuple[int, int, int]]:
    """Cut the time axis into (start, number of chunks, tokens per chunk); the ragged tail is a chunk of its own."""
    batch, time, heads, _ = w.shape
    full, tail = divmod(time, length)
    step = max(1, _PANEL // (batch * heads * length)) if w.device.type == "cpu" else max(1, full)
    panels = [(c * length, min(step, full - c), length) for c in range(0, full, step)]
    if tail:
        panels.append((full * length, 1, tail))
    return panels


def _rows(x: Tensor, start: int, chunks: int, length: int) -> Tensor:
    """View (B, T, H, N) as the (chunks, B, H, length, N) of one panel."""
    return x[:, start : start + chunks * length].unflatten(1, (chunks, length)).permute(1, 0, 3, 2, 4)


def _matrices(x: Tensor, span: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Copy a panel of (B, T, H, N) to (G, L, N): elementwise work on the strided rows would cost more than this."""
    rows = _rows(x, *span)
    return torch.empty(rows.shape, dtype=dtype, device=x.device).copy_(rows).view(-1, *rows.shape[-2:])


class _Panel:
    """The decayed operands of some chunks, G = chunks * B * H matrices of L rows.

    Attributes:
        r, k, v: (G, L, N).
        log_decay, through: log of the decays and P_{t+1}, (G, L, N).
        total: P_L (G, N).
        rd, ks, kd: r_t o P_t, k_j / P_{j+1} (0 in strong channels), k_j o P_L / P_{j+1}, (G, L, N).
        strong: the channels that decay too much for the matrix product, or None.
    """

    def __init__(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, span: tuple, dtype: torch.dtype):
        self.r, self.k, self.v = (_matrices(x, span, dtype) for x in (r, k, v))
        self.log_decay = _matrices(w, span, dtype).exp_().neg_()
        decay = torch.exp(self.log_decay)
        self.through = torch.cumprod(decay, dim=1)
        self.total = self.through[:, -1]
        self.rd = torch.empty_like(decay)
        self.rd[:, 0] = self.r[:, 0]
        torch.mul(self.r[:, 1:], self.through[:, :-1], out=self.rd[:, 1:])
        self.ks = self.k / self.through
        self.kd = self.ks * self.total.unsqueeze(1)
        self.strong = None
        weak = (self.total >= _LIMIT[dtype]) & (self.log_decay.amin(1) >= _GRADIENT_LIMIT)
        if not bool(weak.all()):
            self.strong = _Strong(~weak, self.r, self.k, decay)
            self.strong.put(self.ks, 0.0)
            self.strong.put(self.kd, self.strong.kd)

    def scores(self, u: Tensor, out: Tensor) -> Tensor:
        """The matrices A (G, L, L)."""
        torch.bmm(self.rd, self.ks.transpose(1, 2), out=out).tril_(-1)
        if self.strong is not None:
            self.strong.add_scores(out)
        rku = (self.r * self.k).unflatten(0, (-1, len(u))).mul_(u.unsqueeze(1))
        out.diagonal(dim1=1, dim2=2).copy_(rku.sum(-1).flatten(0, 1))
        return out


class _Strong:
    """Exact share of the strongly decaying channels, gathered as E (chunk, channel) entries of L tokens.

    Attributes:
        r, k, decay: (E, L); after: products of the later decays of the chunk (E, L); kd: k o after.
    """

    def __init__(self, mask: Tensor, r: Tensor, k: Tensor, decay: Tensor):
        self.block, self.channel = mask.nonzero(as_tuple=True)
        length, size = decay.shape[1:]
        token = torch.arange(length, device=decay.device)
        self.index = ((self.block * length).unsqueeze(1) + token) * size + self.channel.unsqueeze(1)
        self.r, self.k, self.decay = self.take(r), self.take(k), self.take(decay)
        self.after = torch.ones_like(self.decay)
        self.after[:, :-1] = self.decay[:, 1:].flip(1).cumprod(1).flip(1)
        self.kd = self.k * self.after

    def take(self, x: Tensor) -> Tensor:
        """The entries (E, L) of x (G, L, N)."""
        return torch.take(x, self.index)

    def put(self, x: Tensor, values: Tensor | float) -> None:
        """Write the entries (E, L) of x (G, L, N)."""
        x.view(-1)[self.index] = values

    def pairs(self) -> Iterator[tuple[slice, Tensor]]:
        """Some entries at a time: the products of the decays strictly between j and t for j < t, else 0 (e, t, j)."""
        length = self.decay.shape[1]
        step = max(1, _EXACT_ELEMENTS // length**2)
        for start in range(0, len(self.block), step):
            part = slice(start, start + step)
            decay = self.decay[part]
            between = decay.new_zeros(len(decay), length, length)
            for t in range(1, length):
                between[:, t, t - 1] = 1.0
                torch.mul(between[:, t - 1, : t - 1], decay[:, t - 1 : t], out=between[:, t, : t - 1])
            yield part, between

    def add_scores(self, a: Tensor) -> None:
        for part, between in self.pairs():
            between.mul_(self.r[part].unsqueeze(2)).mul_(self.k[part].unsqueeze(1))
            a.index_add_(0, self.block[part], between)

    def correct(self, dr, dk, dlw, da, rdr, vg, total, before, dafter) -> None:
        """Replace dr, dk and dlw (G, L, N) at the strong entries, where dr and rdr hold the state's share only.

        da (G, L, L) is strictly lower; rdr is r o dr (G, L, N), vg = v_j G (E, L); total (G, N); before and dafter
        (G, N, N) are the states before the chunks and the gradients of those after them.
        """
        exact_dr, exact_dk = self.take(dr), vg * self.after
        # What passes token t: through the whole chunk, from the state to later tokens, from earlier tokens to its end.
        rows = self.block, self.channel
        exact_dlw = ((before[rows] * dafter[rows]).sum(-1) * total[rows]).unsqueeze(1).repeat(1, dr.shape[1])
        exact_dlw[:, :-1] += self.take(rdr)[:, 1:].flip(1).cumsum(1).flip(1)
        exact_dlw[:, 1:] += (self.kd * vg)[:, :-1].cumsum(1)
        for part, pairs in self.pairs():
            pairs.mul_(da[self.block[part]])
            exact_dr[part] += torch.bmm(pairs, self.k[part].unsqueeze(2)).squeeze(2)
            pairs.mul_(self.r[part].unsqueeze(2))
            exact_dk[part] += pairs.sum(1)
            # and from token j < t to token s > t: the sum over j < t at column t - 1, over s > t in the lower triangle
            earlier = pairs.mul_(self.k[part].unsqueeze(1)).cumsum(2).tril_(-2)
            exact_dlw[part, 1:] += earlier.sum(1)[:, :-1]
        self.put(dr, exact_dr)
        self.put(dk, exact_dk)
        self.put(dlw, exact_dlw)


def _forward(
    r, k, v, w, u, state, chunk_length: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y (B, T, H, N) in r's dtype, the final state, and for the backward, if wanted, the states between the chunks
    (chunks + 1, B*H, N, N) and the matrices A of all panels, one after the other in one dimension."""
    batch, time, heads, size = r.shape
    matrices = batch * heads
    dtype = compute_dtype(r, k, v, w, u, state)
    spans = _panels(w, chunk_length)
    u = u.to(dtype)
    y = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    combine = sum if keep else max
    states = u.new_empty(combine(chunks for _, chunks, _ in spans) + 1, matrices, size, size)
    states[0] = 0.0 if state is None else state.reshape(-1, size, size)
    scores = u.new_empty(combine(chunks * length**2 for _, chunks, length in spans) * matrices)
    first = used = 0
    for span in spans:
        chunks, length = span[1:]
        panel = _Panel(r, k, v, w, span, dtype)
        count = chunks * matrices * length**2
        a = panel.scores(u, scores[used : used + count].view(-1, length, length))
        inner = states[first : first + chunks + 1]
        total = panel.total.unflatten(0, (chunks, -1)).unsqueeze(-1)
        kd = panel.kd.view(chunks, -1, length, size).transpose(2, 3)
        values = panel.v.view(chunks, -1, length, size)
        for c in range(chunks):
            torch.mul(inner[c], total[c], out=inner[c + 1]).baddbmm_(kd[c], values[c])
        out = torch.bmm(a, panel.v).baddbmm_(panel.rd, inner[:-1].view(-1, size, size))
        rows = _rows(y, *span)
        rows.copy_(out.view(rows.shape))
        if keep:
            first += chunks
            used += count
        else:
            states[0] = inner[-1]
    final = states[first].view(batch, heads, size, size).clone()
    return (y, final, states, scores) if keep else (y, final, None, None)


def _backward(r, k, v, w, u, states, scores, dy, dfinal, chunk_length: int) -> tuple[Tensor, ...]:
    """Gradients of r, k, v, w, u in their dtypes and of the initial state, given those of y and the final state."""
    batch, time, heads, size = r.shape
    dtype = states.dtype
    spans = _panels(w, chunk_length)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v, w)]
    bonus = u.to(dtype)
    du = torch.zeros_like(bonus)
    dstates = states.new_empty(max(chunks for _, chunks, _ in spans) + 1, *states.shape[1:])
    carry = torch.zeros_like(states[0]) if dfinal is None else dfinal.reshape(-1, size, size)
    if dy is None:
        dy = torch.zeros_like(r)
    last, used = len(states) - 1, len(scores)
    edge, chained = None, 0  # D at the end of the panel at hand, and the number of tokens since it was anchored
    for span in reversed(spans):
        chunks, length = span[1:]
        panel = _Panel(r, k, v, w, span, dtype)
        strong = panel.strong
        count = chunks * batch * heads * length**2
        a = scores[used - count : used].view(-1, length, length)
        dout = _matrices(dy, span, dtype)
        total = panel.total.unflatten(0, (chunks, -1)).unsqueeze(-1)
        rd = panel.rd.view(chunks, -1, length, size).transpose(2, 3)
        douts = dout.view(chunks, -1, length, size)
        dstates[chunks] = carry
        for c in reversed(range(chunks)):
            torch.mul(dstates[c + 1], total[c], out=dstates[c]).baddbmm_(rd[c], douts[c])
        carry = dstates[0]
        before = states[last - chunks : last].view(-1, size, size)
        dbefore = dstates[:chunks].view(-1, size, size)
        dafter = dstates[1 : chunks + 1].view(-1, size, size)
        last -= chunks
        used -= count

        dv = torch.bmm(a.transpose(1, 2), dout).baddbmm_(panel.kd, dafter)
        da = torch.bmm(dout, panel.v.transpose(1, 2))
        dbonus = da.diagonal(dim1=1, dim2=2).clone()  # (G, L)
        da.tril_(-1)
        # Gradients of rd and ks; in strong channels only the state's share.
        drd = torch.bmm(da, panel.ks).baddbmm_(dout, before.transpose(1, 2))
        dks = torch.bmm(panel.v, dafter.transpose(1, 2))
        vg = None if strong is None else strong.take(dks)
        dks.mul_(panel.total.unsqueeze(1)).baddbmm_(da.transpose(1, 2), panel.rd)
        rdr, kdk = panel.rd * drd, panel.ks.mul_(dks)
        if strong is not None or edge is None or chained >= _CHAINED:
            starts, chained = (before * dbefore).sum(-1), 0
        else:
            gains = (kdk.sum(1) - rdr.sum(1)).view(chunks, -1, size)
            starts, chained = (edge - gains.flip(0).cumsum(0).flip(0)).view(-1, size), chained + chunks * length
        edge = starts[: batch * heads]
        steps = torch.empty_like(rdr)
        torch.sub(starts, rdr[:, 0], out=steps[:, 0])
        torch.sub(kdk[:, :-1], rdr[:, 1:], out=steps[:, 1:])
        dlw = steps.cumsum(1)
        dr, dk = drd, dks.div_(panel.through)
        dr[:, 1:] *= panel.through[:, :-1]
        if strong is not None:
            strong.correct(dr, dk, dlw, da, rdr, vg, panel.total, before, dafter)
            panel.log_decay.clamp_(min=-1e4)  # exp(-1e4) = 0 = its gradient; no 0 * inf
        dw = dlw.mul_(panel.log_decay)
        rk = torch.mul(panel.r, panel.k, out=rdr)
        du += torch.bmm(dbonus.unsqueeze(1), rk).view(-1, heads, size).sum(0)
        dbonus_u = (dbonus.view(-1, heads, length, 1) * bonus.unsqueeze(1)).view_as(dr)
        dr.addcmul_(dbonus_u, panel.k)
        dk.addcmul_(dbonus_u, panel.r)
        for grad, part in zip(grads, (dr, dk, dv, dw), strict=True):
            rows = _rows(grad, *span)
            rows.copy_(part.view(rows.shape))
    return *grads, du.to(u.dtype), carry.view(batch, heads, size, size)
