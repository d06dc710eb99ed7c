"""The RWKV World tokenizer: greedy longest match over UTF-8 bytes.

The vocabulary is the text file that RWKV publishes: one token a line, `id literal length`, where the literal is a
Python string or bytes literal and the length counts bytes. Ids start at 1; id 0 pads and ends. The full World
vocabulary comes with the PyPI package `rwkv`; a folder written by `save_pretrained` holds its own `rwkv_vocab.txt`.
"""

import ast
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from transformers.tokenization_python import AddedToken, PythonBackend

from visualrwkv.configuration import IMAGE_TOKEN_ID
from visualrwkv.errors import InputError

VOCAB_FILE = "rwkv_vocab.txt"
WORLD_VOCAB_FILE = "rwkv_vocab_v20230424.txt"
END_TOKEN, END_TOKEN_ID = "<|endoftext|>", 0
IMAGE_TOKEN = "<image>"

_LINE = re.compile(r"(\d+) (.*\S) (\d+)\s*")
_HEAD = 4  # bytes of the prefix that selects the candidate lengths; measured, 3 and 5 are slower


class Vocabulary:
    """An immutable table of byte tokens with a greedy encoder.

    Args:
        tokens: id -> bytes. All 256 single bytes must be there, so that every input can be encoded; id 0 must be free.
        source: where the table comes from, for error messages.
    """

    def __init__(self, tokens: dict[int, bytes], source: str = "vocabulary"):
        self.tokens = tokens
        self.ids = {token: index for index, token in tokens.items()}
        self.max_id = max(tokens, default=0)
        self.longest = max(map(len, self.ids), default=0)  # bytes
        missing = [byte for byte in range(256) if bytes([byte]) not in self.ids]
        if missing:
            raise InputError(f"{source}: {len(missing)} of the 256 single bytes are missing, first {missing[0]:#04x}")
        if len(self.ids) != len(tokens):
            raise InputError(f"{source}: {len(tokens) - len(self.ids)} tokens occur under two ids")
        if END_TOKEN_ID in tokens:
            raise InputError(f"{source}: id {END_TOKEN_ID} is reserved for padding and end of text")
        longer: dict[bytes, set[int]] = {}
        for token in self.ids:
            if len(token) > _HEAD:
                longer.setdefault(token[:_HEAD], set()).add(len(token))
        # for each prefix of _HEAD bytes: the lengths of the longer tokens that start with it, longest first
        self._longer = {head: tuple(sorted(lengths, reverse=True)) for head, lengths in longer.items()}

    def encode(self, data: bytes) -> list[int]:
        """Token ids of arbitrary bytes, always the longest token that matches next."""
        ids, longer, out = self.ids, self._longer, []
        position, end = 0, len(data)
        while position < end:
            head = data[position : position + _HEAD]
            for length in longer.get(head, ()):
                # a slice cut short by the end of the data can only match a token that is the whole rest
                token = ids.get(data[position : position + length])
                if token is not None:
                    break
            else:
                length = len(head)
                token = ids.get(head)
                while token is None:
                    length -= 1
                    token = ids.get(head[:length])
            out.append(token)
            position += length
        return out

    def write(self, path: str | os.PathLike) -> None:
        """Write the table in the World format."""
        lines = []
        for index, token in sorted(self.tokens.items()):
            try:
                literal = repr(token.decode("utf-8"))
            except UnicodeDecodeError:
                literal = repr(token)
            lines.append(f"{index} {literal} {len(token)}\n")
        Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")


def _parse_literals(rows: list[re.Match], path: str) -> list[str | bytes]:
    """Evaluate all literals in one go (65,529 separate calls take ten times as long); name the line of a bad one."""
    try:
        values = ast.literal_eval("[" + ",\n".join(row[2] for row in rows) + "]")
        if len(values) == len(rows) and all(isinstance(value, (str, bytes)) for value in values):
            return values
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass  # found again below, with its line
    values = []
    for row in rows:
        try:
            value = ast.literal_eval(row[2])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
        if not isinstance(value, (str, bytes)):
            raise InputError(f"{path}: token {row[1]} is {row[2][:40]}, not a Python string or bytes literal")
        values.append(value)
    return values


@lru_cache(maxsize=4)
def _read(path: str, _mtime_ns: int, _size: int) -> Vocabulary:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a World vocabulary, byte {error.start} is not UTF-8") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        row = _LINE.fullmatch(line)
        if row:
            rows.append(row)
        elif line.strip():
            raise InputError(f"{path}: line {number} is not `id literal length`: {line[:40]!r}")
    tokens: dict[int, bytes] = {}
    for row, value in zip(rows, _parse_literals(rows, path), strict=True):
        token = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        if len(token) != int(row[3]):
            raise InputError(f"{path}: token {row[1]} has {len(token)} bytes, the file says {row[3]}")
        if int(row[1]) in tokens:
            raise InputError(f"{path}: id {row[1]} occurs twice")
        tokens[int(row[1])] = token
    return Vocabulary(tokens, path)


def read_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """Read a vocabulary in the World format; the parsed table is kept as long as the file does not change."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read the vocabulary: {error.strerror}") from None
    if not os.path.isfile(path):
        raise InputError(f"{path}: not a file; pass a vocabulary in the World format, such as {VOCAB_FILE}")
    return _read(str(path), status.st_mtime_ns, status.st_size)


def world_vocabulary_file() -> Path:
    """Path of the World vocabulary inside the installed package `rwkv`, which is located but never imported."""
    spec = importlib.util.find_spec("rwkv")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / WORLD_VOCAB_FILE
        if path.is_file():
            return path
    raise InputError(f"the World vocabulary {WORLD_VOCAB_FILE} is missing; run `pip install rwkv` or pass vocab_file")


def subset_vocabulary(texts: Iterable[str], size: int, vocab_file: str | os.PathLike | None = None) -> list[bytes]:
    """Choose a small vocabulary for a small world of texts.

    Args:
        texts: the strings the model will read and write.
        size: number of tokens: the 256 bytes plus those that greedy World encoding of the texts uses most.
        vocab_file: the table to choose from, the World vocabulary by default.

    Returns:
        At most `size` tokens (fewer if the texts use fewer), in the order of their World ids; `write_vocabulary`
        numbers them from 1.
    """
    if size < 256:
        raise InputError(f"a vocabulary needs its 256 single bytes, size {size} is too small")
    world = read_vocabulary(vocab_file or world_vocabulary_file())
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(world.encode(to_utf8(text)))
    longer = [index for index in counts if len(world.tokens[index]) > 1]
    longer.sort(key=lambda index: (-counts[index], index))
    chosen = {world.ids[bytes([byte])] for byte in range(256)}.union(longer[: size - 256])
    return [world.tokens[index] for index in sorted(chosen)]


def write_vocabulary(tokens: Iterable[bytes], path: str | os.PathLike) -> None:
    """Write tokens as a World-format file with ids 1, 2, 3, ..."""
    Vocabulary(dict(enumerate(tokens, 1)), str(path)).write(path)


def to_utf8(text: str) -> bytes:
    """UTF-8 bytes of a string; surrogates (JSON may hold them) become their character, a lone one U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode("utf-8")


class RWKVWorldTokenizer(PythonBackend):
    """RWKV World tokenizer for transformers.

    Text never turns into a special token: the string "<image>" encodes as ordinary text, and the image token enters a
    sequence by its id alone (`split_special_tokens=False` asks for the usual transformers behaviour).

    Args:
        vocab_file: vocabulary in the World format; the World vocabulary of the package `rwkv` by default.
        image_token_id: id of the image placeholder; 65535 beside the World vocabulary, otherwise the last id + 1.

    `vocab_size` counts the tokens of the table; `len(tokenizer)` the rows that an embedding needs, up to the highest id
    (some below the World image token are free), as `model.resize_token_embeddings(len(tokenizer))` expects.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str | os.PathLike | None = None, image_token_id: int | None = None, **kwargs):
        self.vocabulary = read_vocabulary(vocab_file or world_vocabulary_file())
        if image_token_id is None:
            is_small = self.vocabulary.max_id + 1 < 65530
            image_token_id = self.vocabulary.max_id + 1 if is_small else IMAGE_TOKEN_ID
        if image_token_id <= 0 or image_token_id in self.vocabulary.tokens:
            raise InputError(f"image_token_id {image_token_id} is taken; choose one above {self.vocabulary.max_id}")
        special = {END_TOKEN_ID: END_TOKEN, image_token_id: IMAGE_TOKEN}
        self._added_tokens_decoder = {
            index: AddedToken(text, special=True, normalized=False) for index, text in special.items()
        }
        # a saved tokenizer repeats its special tokens, possibly under an id that the caller now overrides
        added = kwargs.pop("added_tokens_decoder", {})
        kwargs["added_tokens_decoder"] = {i: t for i, t in added.items() if str(t) not in special.values()}
        kwargs.setdefault("split_special_tokens", True)
        kwargs.pop("pad_token", None), kwargs.pop("eos_token", None), kwargs.pop("image_token", None)
        kwargs["model_specific_special_tokens"] = {"image_token": IMAGE_TOKEN}
        super().__init__(
            vocab_file=str(vocab_file) if vocab_file else None,
            image_token_id=image_token_id,
            pad_token=END_TOKEN,
            eos_token=END_TOKEN,
            special_tokens_pattern="none",
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    def __len__(self) -> int:
        return 1 + max(self.vocabulary.max_id, *self._added_tokens_decoder)

    def get_vocab(self) -> dict[str, int]:
        """Token text -> id; bytes that are not UTF-8 appear as surrogate escapes."""
        table = {_show(token): index for index, token in self.vocabulary.tokens.items()}
        return table | self._added_tokens_encoder

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of raw bytes."""
        return self.vocabulary.encode(data)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a string, the direct way: no special tokens, no truncation, a plain list."""
        return self.vocabulary.encode(to_utf8(text))

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """Raw bytes of token ids, which need not be valid UTF-8; InputError for an id outside the table."""
        special = self._special_ids() if skip_special_tokens else ()
        tokens = self.vocabulary.tokens
        try:
            return b"".join(tokens[index] for index in map(int, ids) if index not in special)
        except KeyError as error:
            raise InputError(f"token id {error} is not in the vocabulary (ids 1 to {self.vocabulary.max_id})") from None

    def _special_ids(self) -> set[int]:
        return {index for index, token in self._added_tokens_decoder.items() if token.special}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        tokens = self.vocabulary.tokens
        return [_show(tokens[index]) for index in self.encode_text(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.vocabulary.ids.get(_raw(token))

    def _convert_id_to_token(self, index: int) -> str:
        token = self.vocabulary.tokens.get(index)
        return "\ufffd" if token is None else _show(token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return _raw("".join(tokens)).decode("utf-8", "replace")

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str = "whole",
    ) -> str:
        """Text of token ids.

        Args:
            errors: "whole" (default) gives one U+FFFD for the entire list as soon as the bytes are not valid UTF-8 or
                an id is not in the table (as the public RWKV tokenizer does), which special tokens are not either:
                leave them out by `skip_special_tokens`; "replace" gives one for each bad piece.
        """
        if clean_up_tokenization_spaces:
            raise InputError("clean_up_tokenization_spaces is not supported: World tokens hold their exact spaces")
        if errors not in ("whole", "replace"):
            raise InputError(f"errors={errors!r}: choose 'whole' or 'replace'")
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        special = self._special_ids()
        pieces = []
        for index in ids:
            if index in special:
                piece = b"" if skip_special_tokens else None
            elif index in self._added_tokens_decoder:
                piece = to_utf8(self._added_tokens_decoder[index].content)
            else:
                piece = self.vocabulary.tokens.get(index)
            if piece is None and errors == "whole":
                return "\ufffd"
            pieces.append("\ufffd".encode() if piece is None else piece)
        try:
            return b"".join(pieces).decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" if errors == "whole" else b"".join(pieces).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the table, the full one too, so that the folder needs nothing else."""
        path = os.path.join(save_directory, (filename_prefix + "-" if filename_prefix else "") + VOCAB_FILE)
        self.vocabulary.write(path)
        return (path,)


def _show(token: bytes) -> str:
    """A token as the string transformers keeps; lossless, as surrogate escapes stand for bytes that are not UTF-8."""
    return token.decode("utf-8", "surrogateescape")


def _raw(token: str) -> bytes:
    return token.encode("utf-8", "surrogateescape")
