"""What a client may ask for: the fields of a chat completion, and where its pictures may come from.

Nothing is ignored silently: a field or value without effect here is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visualrwkv.errors import InputError, short
from visualrwkv.prompt import Turn, check_question, turns_from_messages
from visualrwkv.sampling import Sampling

# name in the request -> field of Sampling
_SAMPLING = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "top_k", "seed", "stop")},
    **{name: name for name in ("presence_penalty", "frequency_penalty", "penalty_decay")},
}
# fields that clients send although they ask for nothing, with the values that do
_NEUTRAL = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "logit_bias": {}, "store": False}
_MARKS = ("user", "metadata", "safety_identifier")  # notes of the client to itself
_KNOWN = {"model", "messages", "stream", "stream_options", *_SAMPLING, *_NEUTRAL, *_MARKS}


class Refused(Exception):
    """A request that is answered by an error.

    Args:
        status: HTTP status.
        message: one sentence for the client.
        param: field of the request that is wrong.
        code: word for programs.
        headers: further HTTP headers.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(_sayable(message, 500))
        param = None if param is None else _sayable(param, 64)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict:
        """The error in OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        message = " ".join(str(self).split())
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def _sayable(text: str, longest: int) -> str:
    """What a client sent may come back in a message: in part, and without halves of characters."""
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Limits:
    """What one request may use.

    Args:
        body_bytes: size of a request.
        max_tokens: longest reply that may be asked for.
        prompt_tokens: longest prompt, image positions included.
        remote_images: fetch pictures from the web.
        remote_bytes: size of one fetched picture.
        remote_seconds: time for fetching all pictures of a request.
    """

    body_bytes: int = 20 * 2**20
    max_tokens: int = 1024
    prompt_tokens: int = 8192
    remote_images: bool = False
    remote_bytes: int = 10 * 2**20
    remote_seconds: float = 10.0


@dataclass(frozen=True)
class ChatRequest:
    """A checked request; `sources` are data URIs and addresses, in order of appearance."""

    turns: list[Turn]
    sources: list[str]
    sampling: Sampling
    stream: bool
    include_usage: bool


def parse(body: bytes, model: str, limits: Limits) -> ChatRequest:
    """Read the body of a request to `/v1/chat/completions`; `Refused` names what is wrong."""
    try:
        data = json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body is not JSON: {error}", code="invalid_json") from None
    except (ValueError, RecursionError) as error:  # Python's advice for such numbers is none for a client
        reason = "too deeply nested" if isinstance(error, RecursionError) else "a number has thousands of digits"
        raise Refused(400, f"the body is not JSON that can be read: {reason}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise Refused(400, "the body must be a JSON object with 'model' and 'messages'", code="invalid_json")
    fields = {name: value for name, value in data.items() if value is not None}
    for name in fields:
        if name not in _KNOWN:
            raise Refused(400, f"{short(name)} is not supported; leave it out", name, "unsupported_parameter")
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name, neutral)
        if value != neutral or isinstance(value, bool) != isinstance(neutral, bool):
            message = f"{name} is {_short(fields[name])}; only {json.dumps(neutral)} is supported"
            raise Refused(400, message, name, "unsupported_value")
    asked = fields.get("model")
    if not isinstance(asked, str):
        raise Refused(400, f"'model' must be a string; this server has {model!r}", "model")
    if asked != model:
        message = f"the model {_short(asked)} does not exist; this server has {model!r}"
        raise Refused(404, message, "model", "model_not_found")
    stream = _flag(fields, "stream", "stream")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise Refused(400, "stream_options may hold 'include_usage' and nothing else", "stream_options")
    if options and not stream:
        raise Refused(400, "stream_options is only for stream=true", "stream_options")
    turns, sources = _conversation(fields.get("messages"))
    return ChatRequest(
        turns, sources, _sampling(fields, limits), stream, _flag(options, "include_usage", "stream_options")
    )


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except RecursionError:
        return "too deeply nested"
    return text if len(text) <= 80 else text[:77] + "..."


def _flag(fields: Mapping, name: str, param: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise Refused(400, f"{name} is {_short(value)}; use true or false", param)
    return bool(value)


def _sampling(fields: dict, limits: Limits) -> Sampling:
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise Refused(400, "max_tokens and max_completion_tokens are the same; pass one of them", "max_tokens")
    default = Sampling.__dataclass_fields__["max_new_tokens"].default
    options: dict[str, Any] = {"max_new_tokens": min(default, limits.max_tokens)}
    for name, field in _SAMPLING.items():
        if name not in fields:
            continue
        try:
            Sampling(**{field: fields[name]})
        except InputError as error:
            raise Refused(400, str(error).replace("max_new_tokens", name), name) from None
        if field == "max_new_tokens" and fields[name] > limits.max_tokens:
            raise Refused(400, f"{name} is {fields[name]}; this server allows up to {limits.max_tokens}", name)
        options[field] = fields[name]
    stop = options.get("stop", ())
    if not isinstance(stop, str) and (len(stop) > 16 or any(len(text) > 256 for text in stop)) or len(stop) > 256:
        raise Refused(400, "stop may hold up to 16 strings of up to 256 characters", "stop")
    if not _encodable("".join(stop)):
        raise Refused(400, "stop holds half of a surrogate pair, which is no character", "stop")
    return Sampling(**options)


def _conversation(messages: Any) -> tuple[list[Turn], list[str]]:
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "'messages' must be a list with at least one message", "messages")
    for number, message in enumerate(messages, 1):
        _check_message(message, f"message {number}")
    try:
        turns, sources = turns_from_messages(messages)
    except InputError as error:
        raise Refused(400, str(error), "messages") from None
    for number, turn in enumerate(turns, 1):
        try:
            _check_turn(turn)
        except InputError as error:
            raise Refused(400, f"message {number}: {error}", "messages") from None
    if turns[-1].role != "user":
        raise Refused(400, "the last message must be the user's; a reply cannot be continued", "messages")
    return turns, sources


def _check_turn(turn: Turn) -> None:
    if not _encodable(turn.text):
        raise InputError("it holds half of a surrogate pair, which is no character")
    if turn.images and not turn.text.strip():
        raise InputError("it shows a picture and asks nothing; put the question into the same message")
    if turn.role == "user":
        check_question(turn.text)


def _encodable(text: str) -> bool:
    """JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_message(message: Any, name: str) -> None:
    """Only what `turns_from_messages` shall see here: text, and pictures that the client sends or that are remote.

    It knows more kinds of parts, among them paths, and no client may name a file of the server.
    """
    if not isinstance(message, dict):
        raise Refused(400, f"{name} is not an object with 'role' and 'content'", "messages")
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise Refused(400, f"{name} holds {_short(extra[0])}, which is not supported; leave it out", "messages")
    content = message.get("content")
    if not isinstance(content, list):
        return
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and set(part) == {"type", "text"}:
            continue
        if kind != "image_url" or set(part) != {"type", "image_url"}:
            form = "{'type': 'text', 'text': ...} or {'type': 'image_url', 'image_url': {'url': ...}}"
            raise Refused(400, f"{name} has a part that is not understood; use {form}", "messages")
        image = part["image_url"]
        if not isinstance(image, dict) or not isinstance(image.get("url"), str) or not image["url"]:
            raise Refused(400, f"{name}: image_url must be an object with the string 'url'", "messages")
        if not image["url"].isascii():
            raise Refused(400, f"{name}: the url of a picture holds characters that are not ASCII", "messages")
        if set(image) - {"url", "detail"} or image.get("detail") not in (None, "auto"):
            raise Refused(400, f"{name}: image_url may hold 'url', and 'detail' with the value \"auto\"", "messages")
        if message.get("role") != "user":
            raise Refused(400, f"{name}: only the user can show pictures", "messages")


def check_prompt(request: ChatRequest, processor, limits: Limits) -> list[int]:
    """Ids of the prompt, through the one prompt builder; the length is looked at before any picture is opened."""
    words = sum(len(turn.text.encode()) for turn in request.turns) // processor.tokenizer.vocabulary.longest
    positions = words + len(request.sources) * processor.num_image_tokens
    if positions <= limits.prompt_tokens:
        ids, _ = processor.encode_turns(request.turns, open_reply=True)
        positions = len(ids)
        if positions <= limits.prompt_tokens:
            return ids
    message = f"the prompt has {positions} tokens or more, {processor.num_image_tokens} for each picture"
    message += f"; this server allows up to {limits.prompt_tokens}"
    raise Refused(400, message, "messages", "context_length_exceeded")
