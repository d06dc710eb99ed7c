"""The endpoint, over a real socket, with the client that people use."""

import base64
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch

from visualrwkv.prompt import Turn
from visualrwkv.sampling import Sampling
from visualrwkv.serving import app, engine, requests

QUESTIONS = ["What is the colour?", "What?", "What is it, 在哪里?", "How many objects do you see in the picture?"]
NEVER = {"temperature": 1.0, "seed": 0}  # a random model rarely ends a reply of its own


@contextmanager
def running(vlm, **settings):
    """A server in a thread; yields (service, address)."""
    settings = app.Settings("tiny-random", **settings)
    listener = app.listen("127.0.0.1", 0)
    server = app.make_server(vlm, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.config.app.state.service, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


LIMITS = requests.Limits(body_bytes=2**20, max_tokens=4000, prompt_tokens=400)


@pytest.fixture(scope="module")
def server(vlm):
    with running(vlm, slots=8, queue=24, limits=LIMITS) as (service, address):
        yield service, address


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def data_uri(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def shown(text, *pictures):
    """A user's message."""
    parts = [{"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def complete(client, *messages, **options):
    options = {"max_tokens": 12, **options}
    return client.chat.completions.create(model="tiny-random", messages=list(messages), **options)


def text_of(answer):
    return answer.choices[0].message.content


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def idle(service):
    return service.engine.load == (0, 0) and service.tickets == 32


def test_an_answer_is_that_of_ask(client, vlm, pictures):
    answer = complete(client, shown(QUESTIONS[0], pictures[0]))
    assert text_of(answer) == vlm.ask(pictures[0], QUESTIONS[0], max_new_tokens=12)
    ids, _ = vlm.processor.encode_turns([Turn("user", QUESTIONS[0], images=1)], open_reply=True)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.total_tokens == len(ids) + answer.usage.completion_tokens
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.object == "chat.completion" and answer.model == "tiny-random"
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.choices[0].message.role == "assistant"
    alone = complete(client, {"role": "user", "content": QUESTIONS[1]}, max_tokens=openai.omit, max_completion_tokens=5)
    assert text_of(alone) == vlm.ask(None, QUESTIONS[1], max_new_tokens=5) and alone.usage.completion_tokens <= 5


def test_several_turns_and_pictures_are_read_through_the_prompt_builder(client, vlm, pictures):
    messages = [
        shown("What?", pictures[0]),
        {"role": "assistant", "content": "red"},
        shown("And these?", pictures[1], pictures[2]),
    ]
    turns = [Turn("user", "What?", 1), Turn("assistant", "red"), Turn("user", "And these?", 2)]
    inputs = vlm.processor.prepare([pictures[:3]], [turns])
    assert [text_of(complete(client, *messages))] == vlm.answers(inputs, Sampling(max_new_tokens=12))


def test_a_stream_is_the_same_answer_in_pieces(client, server, vlm, pictures):
    expected = vlm.ask(pictures[0], QUESTIONS[2], max_new_tokens=40, **NEVER)
    chunks = list(complete(client, shown(QUESTIONS[2], pictures[0]), stream=True, max_tokens=40, **NEVER))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]][1] in ("stop", "length")
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 3
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = complete(client, shown(QUESTIONS[2], pictures[0]), max_tokens=40, **options, **NEVER)
    whole = complete(client, shown(QUESTIONS[2], pictures[0]), max_tokens=40, **NEVER)
    assert last.choices == [] and last.usage == whole.usage and all(chunk.usage is None for chunk in chunks)
    body = {"model": "tiny-random", "messages": [{"role": "user", "content": "What?"}], "stream": True}
    raw = httpx.post(server[1] + "/v1/chat/completions", json=body | {"max_tokens": 3})
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith("data: [DONE]\n\n")
    assert all(line.startswith("data: ") for line in raw.text.strip().split("\n\n"))


def test_requests_of_all_kinds_at_once_are_answered_as_alone(client, server, vlm, pictures):
    """16 requests on 8 slots: some wait and join while others are under way."""
    asked = []
    for number in range(16):
        options = {"max_new_tokens": (3, 40, 11, 80)[number % 4]}
        if number % 2:
            options |= {"temperature": 1.2, "seed": number, "top_p": 0.9}
        if number % 3 == 0:
            options |= {"presence_penalty": 0.7, "frequency_penalty": 0.3}
        if number % 5 == 0:
            options |= {"stop": ["e", "or"]}
        picture = None if number % 7 == 3 else pictures[number % 4]
        asked.append((picture, QUESTIONS[number // 2 % 4], options))
    expected = [vlm.ask(picture, question, **options) for picture, question, options in asked]

    def ask(case):
        picture, question, options = case
        options = {**options, "max_tokens": options["max_new_tokens"]}
        del options["max_new_tokens"]
        return text_of(complete(client, shown(question, *([picture] if picture else [])), **options))

    peak, done = [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], server[0].engine.load[0])
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, asked))
    done.set()
    assert answers == expected and len(set(expected)) > 8
    assert 2 <= peak[0] <= 8
    wait_until(lambda: idle(server[0]))


def test_sampling_options_have_their_effect(client, vlm, pictures):
    options = {"temperature": 1.0, "seed": 5, "max_new_tokens": 30}
    extra = {"top_k": 3, "penalty_decay": 0.5}
    expected = vlm.ask(pictures[0], "What?", **options, **extra, frequency_penalty=1)
    answer = complete(
        client,
        shown("What?", pictures[0]),
        max_tokens=30,
        temperature=1.0,
        seed=5,
        frequency_penalty=1,
        extra_body=extra,
    )
    assert text_of(answer) == expected != vlm.ask(pictures[0], "What?", **options)


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["tiny-random"]
    assert client.models.retrieve("tiny-random").owned_by == "visualrwkv"
    with pytest.raises(openai.NotFoundError, match="gpt-x"):
        client.models.retrieve("gpt-x")
    health = httpx.get(server[1] + "/health")
    assert health.status_code == 200 and health.json()["status"] == "ok"


USER = {"role": "user", "content": "What?"}


def image(url, **more):
    return {"role": "user", "content": [{"type": "text", "text": "What?"},
                                        {"type": "image_url", "image_url": {"url": url, **more}}]}  # fmt: skip


PICTURE_ALONE = {"role": "user", "content": image("data:,")["content"][1:]}
BAD = [
    ({"model": "gpt-x"}, 404, "gpt-x"),
    ({"model": 3}, 400, "'model'"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "What?"}, 400, "messages"),
    ({"messages": [7]}, 400, "message 1"),
    ({"messages": [{"role": "system", "content": "Be kind."}, USER]}, 400, "system"),
    ({"messages": [{"role": "tool", "content": "3"}]}, 400, "tool"),
    ({"messages": [USER, {"role": "assistant", "content": "A"}]}, 400, "last message"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "empty"),
    ({"messages": [USER, {"role": "user", "content": "\ud800"}]}, 400, "message 2: it holds half of a surrogate"),
    ({"messages": [USER, {"role": "user", "content": ""}, USER]}, 400, "message 2: the question is empty"),
    ({"messages": [PICTURE_ALONE, USER]}, 400, "message 1: it shows a picture and asks nothing; put the question into"),
    ({"messages": [{"role": "user"}]}, 400, "content"),
    ({"messages": [{"role": "user", "content": "What is <image>?"}]}, 400, "<image>"),
    ({"messages": [{"role": "user", "content": "a b " * 500}]}, 400, "up to 400"),
    ({"messages": [{"role": "user", "content": "x" * 500_000}]}, 400, "up to 400"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}, 400, "image_url"),
    ({"messages": [image("/etc/hostname")]}, 400, "data URI"),
    ({"messages": [image("file:///etc/hostname")]}, 400, "data URI"),
    ({"messages": [image("http://127.0.0.1:1/a.png")]}, 400, "--allow-remote-images"),
    ({"messages": [image("data:image/png;base64,AAAA")]}, 400, "picture 1"),
    ({"messages": [image("data:image/png,AAAA")]}, 400, "base64"),
    ({"messages": [image("data:image/png;base64,AAAA", detail="high")]}, 400, "detail"),
    ({"messages": [image("data:,")] * 60}, 400, "up to 400"),
    ({"messages": [image("data:image/png;base64,\u00e9")]}, 400, "not ASCII"),
    ({"messages": [image("data:image/png;base64,\ud800")]}, 400, "not ASCII"),
    ({"messages": [image("data:image/png;base64,A")]}, 400, "damaged"),
    ({"messages": [{"role": [], "content": "What?"}]}, 400, "role []"),
    ({"messages": [{"role": {}, "content": "What?"}]}, 400, "role {}"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, 400, "needs a string"),
    ({"\ud800": 1}, 400, "not supported"),
    ({"temperature": "x" * 10**5}, 400, "temperature is 'xxx"),
    ({"x" * 10**5: 1}, 400, "not supported"),
    ({"max_tokens": 10**9}, 400, "1000000000"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "one of them"),
    ({"max_completion_tokens": "5"}, 400, "max_completion_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"seed": -3}, 400, "seed"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"presence_penalty": "much"}, 400, "presence_penalty"),
    ({"n": 2}, 400, "n is 2"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"logprobs": 0}, 400, "logprobs is 0; only false"),
    ({"n": True}, 400, "n is true; only 1"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"tools": []}, 400, "tools"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream": 0}, 400, "stream is 0; use true or false"),
    ({"stream": ""}, 400, 'stream is ""'),
    ({"stream": True, "stream_options": {"include_usage": 0}}, 400, "include_usage is 0"),
    ({"stop": ["a", "\ud800"]}, 400, "stop holds half"),
    ({"stream_options": {"include_usage": True}}, 400, "stream=true"),
]


@pytest.mark.parametrize(("change", "status", "word"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_are_refused_by_name(server, change, status, word):
    body = json.dumps({"model": "tiny-random", "messages": [USER], "max_tokens": 3} | change)
    refused(httpx.post(server[1] + "/v1/chat/completions", content=body, headers=JSON), status, word)


JSON = {"Content-Type": "application/json"}


def refused(response, status, word):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"] and "\n" not in error["message"] and "Traceback" not in response.text
    assert len(response.text) < 1000
    return error


NO_JSON = [b"", b"{", b"[]", b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("body", NO_JSON, ids=lambda body: str(body[:9]))
def test_a_body_that_is_not_json(server, body):
    refused(httpx.post(server[1] + "/v1/chat/completions", content=body, headers=JSON), 400, "JSON")


def test_a_number_that_python_does_not_read(server):
    body = b'{"max_tokens": 1' + b"0" * 5000 + b"}"
    error = refused(httpx.post(server[1] + "/v1/chat/completions", content=body, headers=JSON), 400, "of digits")
    assert "sys." not in error["message"]


def test_other_pages_methods_and_types(server):
    refused(httpx.get(server[1] + "/v1/chat/completions"), 405, "GET")
    refused(httpx.post(server[1] + "/v1/completions", json={}), 404, "/v1/completions")
    refused(httpx.get(server[1] + "/docs"), 404, "/docs")
    plain = {"Content-Type": "text/plain"}
    refused(httpx.post(server[1] + "/v1/chat/completions", content=b"{}", headers=plain), 415, "application/json")


def test_a_picture_of_100_mb_is_refused_and_the_server_goes_on(server, client):
    def chunks():  # a client that does not say the size beforehand
        yield b'{"model": "tiny-random", "messages": [{"role": "user", "content": "'
        for _ in range(100):
            yield b"A" * 2**20

    with httpx.Client(timeout=60) as plain:
        for content in (b"A" * (10 * 2**20), chunks()):
            refused(plain.post(server[1] + "/v1/chat/completions", content=content, headers=JSON), 413, "1 MiB")
    assert text_of(complete(client, USER)) is not None
    wait_until(lambda: idle(server[0]))


def test_many_pixels_in_few_bytes(server, huge_png):
    uri = "data:image/png;base64," + base64.b64encode(huge_png).decode()
    body = {"model": "tiny-random", "messages": [image(uri)]}
    refused(httpx.post(server[1] + "/v1/chat/completions", json=body), 400, "pixels")


LONG = {"model": "tiny-random", "messages": [USER], "max_tokens": 4000, **NEVER}


def send(address, body):
    """A socket over which a request was sent."""
    host, port = address.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head += [f"Content-Length: {len(data)}", "", ""]
    sock = socket.create_connection((host, int(port)), timeout=60)
    sock.sendall("\r\n".join(head).encode() + data)
    return sock


def open_stream(address, body):
    """A socket with a streamed answer of which the head has arrived."""
    sock = send(address, body | {"stream": True})
    assert b"200 OK" in sock.recv(1000)
    return sock


@contextmanager
def replies_never_end(monkeypatch):
    """Replies go on for good, whatever the model writes: for tests of clients that leave."""
    with monkeypatch.context() as patch:
        patch.setattr(engine.ServedReply, "take", lambda self, token: self.tokens.append(token) or "x")
        yield


def test_a_client_that_asks_before_it_sends_too_much_hears_it_at_once(server):
    host, port = server[1].removeprefix("http://").split(":")
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head += ["Content-Length: 500000000", "Expect: 100-continue", "", ""]
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall("\r\n".join(head).encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_killed_client_frees_its_slot(server, client, monkeypatch):
    service, address = server
    with replies_never_end(monkeypatch):
        socks = [open_stream(address, LONG) for _ in range(8)]
        wait_until(lambda: service.engine.load[0] == 8)
        blocked = send(address, LONG)  # waits for a slot, without a stream
        wait_until(lambda: service.engine.load == (8, 1))
        socks[0].close()
        wait_until(lambda: service.engine.load == (8, 0))  # the one that waited has the slot
        for sock in (*socks[1:], blocked):
            sock.close()
        wait_until(lambda: idle(service))
    assert text_of(complete(client, USER)) is not None


def test_what_nobody_thought_of_is_an_answer_too(server, client, monkeypatch, vlm):
    def broken(*arguments):
        raise LookupError("odd")

    with monkeypatch.context() as patch:
        patch.setattr(app, "check_prompt", broken)
        body = json.dumps({"model": "tiny-random", "messages": [USER]})
        refused(httpx.post(server[1] + "/v1/chat/completions", content=body, headers=JSON), 500, "its log says why")
    assert text_of(complete(client, USER)) is not None


def test_overload_is_told_at_once(server, client, monkeypatch):
    service, address = server
    with replies_never_end(monkeypatch):
        socks = [open_stream(address, LONG) for _ in range(32)]
        wait_until(lambda: service.engine.load == (8, 24))
        with pytest.raises(openai.RateLimitError) as told:
            complete(client, USER)
        assert told.value.response.headers["Retry-After"] == "1" and told.value.body["code"] == "overloaded"
        assert httpx.get(address + "/health").json()["tickets"] == 0
        for sock in socks:
            sock.close()
        wait_until(lambda: idle(service))
    assert text_of(complete(client, USER)) is not None


def test_answers_do_not_wait_for_the_confirmation_of_their_headers():
    with app.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_failing_reply_is_reported_and_the_next_one_works(server, client, vlm, monkeypatch, capsys):
    no_numbers = torch.nn.Parameter(torch.full_like(vlm.model.rwkv.head.weight, torch.nan))
    for damage, options, error in (
        (
            lambda patch: patch.setattr(engine.ServedReply, "choose", lambda *_: 1 / 0),
            {"temperature": 1},
            "ZeroDivisionError",
        ),
        (lambda patch: patch.setitem(vlm.model.rwkv.head._parameters, "weight", no_numbers), {}, "NaN"),
    ):
        with monkeypatch.context() as patch:
            damage(patch)
            with pytest.raises(openai.InternalServerError, match="its log"):
                complete(client, USER, **options)
            with pytest.raises(openai.APIError, match="its log"):
                list(complete(client, USER, stream=True, **options))
        assert error in capsys.readouterr().err
        assert text_of(complete(client, USER)) is not None
    wait_until(lambda: idle(server[0]))


def test_an_api_key_keeps_others_out(vlm):
    with running(vlm, slots=1, queue=0, api_key="secret") as (_, address):
        for key in ("wrong", "sécret"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            for page in ("/v1/models", "/v1/models/tiny-random"):
                refused(httpx.get(address + page, headers=headers), 401, "key")
            refused(httpx.post(address + "/v1/chat/completions", json=LONG, headers=headers), 401, "key")
        assert httpx.get(address + "/health").status_code == 200
        with openai.OpenAI(base_url=address + "/v1", api_key="secret", max_retries=0) as client:
            assert text_of(complete(client, USER)) is not None
