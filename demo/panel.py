"""What the side panel shows: the size of the state against that of a KV cache, and how fast the last reply came."""

from dataclasses import dataclass, replace

from visualrwkv.demo.texts import text


@dataclass(frozen=True)
class Figures:
    """Numbers of one conversation.

    `state_bytes` is what the conversation's state takes, at any length. `cache_bytes_per_token` is what each token
    would add to the KV cache of a transformer of the same size: keys and values of every layer, 16 bits each,
    multi-head attention. Times are None before the first reply.
    """

    state_bytes: int
    cache_bytes_per_token: int
    tokens_read: int = 0
    turns: int = 0
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    cut: bool = False  # the last reply ended at its longest length

    @property
    def cache_bytes(self) -> int:
        return self.cache_bytes_per_token * self.tokens_read

    @property
    def break_even(self) -> int:
        """The number of tokens at which the KV cache becomes larger than the state."""
        return self.state_bytes // self.cache_bytes_per_token + 1


def cache_bytes_per_token(text_config) -> int:
    """Bytes for each token of a transformer's KV cache: 2 (key, value) x layers x width x 2 (16 bits)."""
    return 2 * text_config.num_hidden_layers * text_config.hidden_size * 2


def figures(vlm, chat=None) -> Figures:
    """Figures of a conversation, or of one that has not begun."""
    config = vlm.model.config.text_config
    per_token = cache_bytes_per_token(config)
    empty = config.state_bytes(vlm.model.dtype.itemsize)
    if chat is None or not chat.tokens_read:
        return Figures(empty, per_token)
    turns = sum(turn["role"] == "user" for turn in chat.transcript)
    now = Figures(chat.nbytes, per_token, chat.tokens_read, turns)
    if (stats := chat.stats) is None:  # after undo, or loaded
        return now
    decoding = stats.total_s - stats.first_token_s
    # the first token belongs to the reading of the prompt
    speed = (stats.reply_tokens - 1) / decoding if stats.reply_tokens > 1 and decoding > 0 else None
    return replace(now, first_token_s=stats.first_token_s, tokens_per_s=speed, cut=stats.finish == "length")


def size(count: int) -> str:
    """Bytes with a unit: 153 KiB, 4.5 KiB, 13.2 MiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def html(numbers: Figures, language: str) -> str:
    """The panel. It holds numbers and texts of `texts.py` alone, nothing that a user wrote."""
    largest = max(numbers.state_bytes, numbers.cache_bytes)
    state = _bar("state", language, numbers.state_bytes, largest, text(language, "fixed"))
    growing = text(language, "growing", size=size(numbers.cache_bytes_per_token))
    cache = _bar("cache", language, numbers.cache_bytes, largest, growing)
    if not numbers.tokens_read:
        verdict = text(language, "nothing_read", size=size(numbers.state_bytes))
    elif numbers.cache_bytes > numbers.state_bytes:
        verdict = text(language, "smaller", ratio=f"{numbers.cache_bytes / numbers.state_bytes:.1f}")
    else:
        verdict = text(language, "larger", tokens=f"{numbers.break_even:,}")
    cells = (
        ("tokens_read", f"{numbers.tokens_read:,}"),
        ("turns", f"{numbers.turns:,}"),
        ("first_token", "–" if numbers.first_token_s is None else f"{numbers.first_token_s:.2f} s"),
        ("speed", "–" if numbers.tokens_per_s is None else f"{numbers.tokens_per_s:.0f}"),
    )
    grid = "".join(
        f'<div class="figure" data-figure="{key}"><b>{value}</b><span>{text(language, key)}</span></div>'
        for key, value in cells
    )
    cut = f'<p class="note">{text(language, "cut")}</p>' if numbers.cut else ""
    # on narrow pages this line stays at the top, and the panel stands below the conversation
    sizes = {"state": size(numbers.state_bytes), "cache": size(numbers.cache_bytes)}
    return (
        f'<p class="summary">{text(language, "summary", **sizes)}</p><section class="panel">'
        f"<h2>{text(language, 'memory')}</h2>{state}{cache}"
        f'<p class="verdict">{verdict}</p><div class="grid">{grid}</div>{cut}</section>'
    )


def _bar(key, language, count, largest, note):
    share = max(0.5 if count else 0, 100 * count / largest)  # a sliver stays visible
    return (
        f'<div class="bar {key}"><div class="name"><span>{text(language, key)}</span><b>{size(count)}</b></div>'
        f'<div class="track"><div class="fill" style="width:{share:.1f}%"></div></div>'
        f'<div class="note">{note}</div></div>'
    )
