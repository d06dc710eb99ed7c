"""`visualrwkv serve` under load: 32 clients at once, some of which are killed, against one client at a time.

    python -m bench.serve_load                 # twice two minutes of load; writes bench/results/serve_load.json
    python -m bench.serve_load --seconds 10 --dtype bfloat16 --out /tmp/load.json

The server is a process of its own with the embedded model. Every client asks about drawn scenes, one request after the
other; every answer is compared with the one that `ask` gave alone. What counts as one request after another is the same
server with a single client, measured just before. What a batch gains depends on how much there is to write: so one load
asks questions of all kinds, most of which are answered by a word, and one asks for descriptions. No batch saves the
matrix products of the prompts, which are timed by themselves: they limit what it can gain. The exit code is 1 if
anything was lost, wrong or, in either, too slow.
"""

import argparse
import base64
import http.client
import io
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from bench.measure import products_of_prompts
from bench.report import RESULTS, save, show

CLIENTS = 32
SLOTS, QUEUE = 32, 64  # of the server
KILLED = 0.05  # share of the requests whose client leaves midway
LIMIT = 3.0  # times the throughput of one after another
BURST = 200  # requests at one moment, more than slots and queue hold
LOADS = {"questions of all kinds": None, "descriptions": "describe"}  # name of a load -> the one kind of its questions


def make_cases(count: int, vlm, kind: str | None = None):
    """(body of a request, the answer alone) for questions about drawn scenes, of one kind or of all."""
    from visualrwkv.scenes import draw, questions, sample_scene, scene_rng

    cases = []
    for index in range(count):
        rng = scene_rng(1, "test", index)
        scene = sample_scene(rng, split="test")
        asked = [question for question in questions(scene, rng) if kind in (None, question.kind)]
        question, picture = asked[index % len(asked)].text, draw(scene)
        file = io.BytesIO()
        picture.save(file, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
        options = {"max_tokens": 64}
        if index % 4 == 3:
            options |= {"temperature": 1.0, "seed": index}
        body = {"model": "visualrwkv-tiny", "messages": [{"role": "user", "content": parts}], **options}
        options["max_new_tokens"] = options.pop("max_tokens")
        cases.append((body, vlm.ask(picture, question, **options)))
    return cases


def products(vlm, cases) -> float:
    """Seconds of the bare matrix products of a prompt, of all prompts read at once."""
    from visualrwkv.prompt import Turn

    texts = [body["messages"][0]["content"][1]["text"] for body, _ in cases]
    prompts = [vlm.processor.encode_turns([Turn("user", text, images=1)], open_reply=True)[0] for text in texts]
    return products_of_prompts(vlm.model, sum(map(len, prompts))) / len(prompts)


class Tally:
    """What the clients saw."""

    def __init__(self):
        self._lock = threading.Lock()
        self.seen, self.tokens, self.waits = Counter(), 0, []

    def add(self, what: str, tokens: int = 0, seconds: float | None = None) -> None:
        with self._lock:
            self.seen[what] += 1
            self.tokens += tokens
            if seconds is not None:
                self.waits.append(seconds)


def post(connection, data: str) -> None:
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})


def client(address, cases, until, seed, killed, tally):
    """Ask until the time is over."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection(*address, timeout=60)
    while time.monotonic() < until:
        body, expected = rng.choice(cases)
        leaves, streams = rng.random() < killed, rng.random() < 0.5
        start = time.monotonic()
        try:
            post(connection, json.dumps(body | {"stream": streams or leaves, **_usage(streams or leaves)}))
            if leaves:  # at any moment: before the answer begins, or within it
                time.sleep(rng.random() * 0.2)
                connection.close()
                tally.add("left")
                continue
            answer = connection.getresponse()
            text, tokens = read(answer, streams)
            right = answer.status == 200 and text == expected
            tally.add("right" if right else f"wrong {answer.status}", tokens, time.monotonic() - start)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            tally.add(f"error {type(error).__name__}")
            connection.close()
    connection.close()


def _usage(streams):
    return {"stream_options": {"include_usage": True}} if streams else {}


def read(answer, streams):
    """(text, tokens written) of a response."""
    data = answer.read()
    if not streams:
        whole = json.loads(data)
        return whole["choices"][0]["message"]["content"], whole["usage"]["completion_tokens"]
    events = data.decode().strip().split("\n\n")
    if events[-1] != "data: [DONE]":
        raise ValueError("a stream ended early")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    return text, chunks[-1]["usage"]["completion_tokens"]


def together(count, function):
    """Call a function with each number below `count`, all at once, and wait for them."""
    threads = [threading.Thread(target=function, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def load(address, cases, clients, seconds, killed):
    """Let clients ask for some time; returns their tally and the seconds until the last one had its answer."""
    tally, start = Tally(), time.monotonic()
    until = start + seconds
    together(clients, lambda seed: client(address, cases, until, seed, killed, tally))
    return tally, time.monotonic() - start


def burst(address, cases):
    """Statuses of many requests at one moment."""
    seen, lock, barrier = Counter(), threading.Lock(), threading.Barrier(BURST)

    def ask(index):
        connection = http.client.HTTPConnection(*address, timeout=60)
        data = json.dumps(cases[index % len(cases)][0])
        barrier.wait()
        try:
            post(connection, data)
            answer = connection.getresponse()
            answer.read()
            what = str(answer.status)
        except OSError as error:
            what = type(error).__name__
        with lock:
            seen[what] += 1

    together(BURST, ask)
    return dict(seen)


def health(address):
    connection = http.client.HTTPConnection(*address, timeout=300)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())


def idle(address, seconds=30):
    """Whether all slots get free."""
    for _ in range(seconds * 10):
        now = health(address)
        if (now["running"], now["waiting"], now["tickets"]) == (0, 0, SLOTS + QUEUE):
            return True
        time.sleep(0.1)
    return False


def run(seconds: float, questions: int, dtype: str) -> dict:
    import visualrwkv

    vlm = visualrwkv.load(dtype=dtype)
    cases = {name: make_cases(questions, vlm, kind) for name, kind in LOADS.items()}
    bare = {name: products(vlm, some) for name, some in cases.items()}
    command = [sys.executable, "-m", "visualrwkv.cli", "serve", "--port", "0", "--dtype", dtype]
    command += ["--slots", str(SLOTS), "--queue", str(QUEUE)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", server.stderr.readline())[1])
        address = ("127.0.0.1", port)
        health(address)  # connections wait until the model is loaded
        loads = {name: compare(address, some, seconds, bare[name]) for name, some in cases.items()}
        statuses = burst(address, cases["questions of all kinds"])
        after, _ = load(address, cases["questions of all kinds"], 1, 1, 0)
    finally:
        server.terminate()
        server.wait(30)
    fine = set(statuses) <= {"200", "429"} and not wrong(after)
    return {
        "seconds": seconds,
        "dtype": dtype,
        "clients": CLIENTS,
        **loads,
        f"statuses of {BURST} requests at once": statuses,
        "lost, wrong or failed afterwards": wrong(after),
        "within limits": fine and all(found["within limits"] for found in loads.values()),
    }


def compare(address, cases, seconds: float, bare: float) -> dict:
    """A crowd of clients against a single one, which comes first; `bare`: see `products`."""
    load(address, cases, 1, min(3, seconds), 0)  # warm
    alone, alone_s = load(address, cases, 1, max(5, seconds / 6), 0)
    crowd, crowd_s = load(address, cases, CLIENTS, seconds, KILLED)
    freed, problems, waits = idle(address), wrong(alone, crowd), sorted(crowd.waits)
    one, many = alone.seen["right"] / alone_s, crowd.seen["right"] / crowd_s
    return {
        "questions": len(cases),
        "answers": crowd.seen["right"],
        "tokens an answer": round(alone.tokens / alone.seen["right"], 1),
        "clients killed": crowd.seen["left"],
        "lost, wrong or failed": problems,
        "answers a second": round(many, 2),
        "tokens a second": round(crowd.tokens / crowd_s, 1),
        "answers a second, one after another": round(one, 2),
        "tokens a second, one after another": round(alone.tokens / alone_s, 1),
        "times one after another": round(many / one, 2),
        "bare matrix products of a prompt ms": round(1e3 * bare, 1),
        "times, if only these took time": round(1 / (bare * one), 2),
        "median wait s": round(waits[len(waits) // 2], 3),
        "longest wait s": round(waits[-1], 3),
        "all slots free afterwards": freed,
        "within limits": not problems and freed and many >= LIMIT * one,
    }


def wrong(*tallies: Tally) -> dict:
    """What should not have been."""
    seen = sum((tally.seen for tally in tallies), Counter())
    return {name: count for name, count in seen.items() if name not in ("right", "left")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="of each load (default 120)")
    parser.add_argument("--questions", type=int, default=48, help="of a load, that clients choose among (default 48)")
    parser.add_argument("--dtype", default="auto", help="of the server (default auto: that of the embedded model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_load.json")
    options = parser.parse_args()
    results = run(options.seconds, options.questions, options.dtype)
    show(results, 42, LOADS)
    save(results, options.out)
    return 0 if results["within limits"] else 1


if __name__ == "__main__":
    sys.exit(main())
