"""`visualrwkv serve` under load: 32 clients at once, some of which are killed, against one client at a time.

    python -m bench.serve_load                 # two minutes of load; writes bench/results/serve_load.json
    python -m bench.serve_load --seconds 10 --dtype bfloat16 --out /tmp/load.json

The server is a process of its own with the embedded model. Every client asks about drawn scenes, one request after the
other; every answer is compared with the one that `ask` gave alone. What counts as one request after another is the same
server with a single client, measured just before. The exit code is 1 if anything was lost, wrong or too slow.
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

from bench.real_size import RESULTS, surroundings

CLIENTS = 32
KILLED = 0.05  # share of the requests whose client leaves midway
LIMIT = 3.0  # times the throughput of one after another
BURST = 200  # requests at one moment, more than slots and queue hold


def make_cases(count: int, dtype: str = "auto"):
    """(body of a request, the answer alone) for questions of all kinds about drawn scenes."""
    import visualrwkv
    from visualrwkv.scenes import draw, questions, sample_scene, scene_rng

    vlm, cases = visualrwkv.load(dtype=dtype), []
    for index in range(count):
        rng = scene_rng(1, "test", index)
        scene = sample_scene(rng, split="test")
        asked = list(questions(scene, rng))
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


def client(address, cases, until, seed, killed, tally):
    """Ask until the time is over."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection(*address, timeout=60)
    while time.monotonic() < until:
        body, expected = rng.choice(cases)
        leaves, streams = rng.random() < killed, rng.random() < 0.5
        start = time.monotonic()
        try:
            data = json.dumps(body | {"stream": streams or leaves, **_usage(streams or leaves)})
            connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
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


def load(address, cases, clients, seconds, killed):
    """Let clients ask for some time; returns their tally and the seconds until the last one had its answer."""
    tally, start = Tally(), time.monotonic()
    until = start + seconds
    threads = [
        threading.Thread(target=client, args=(address, cases, until, seed, killed, tally)) for seed in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally, time.monotonic() - start


def burst(address, cases):
    """Statuses of many requests at one moment."""
    seen, lock, barrier = Counter(), threading.Lock(), threading.Barrier(BURST)

    def ask(index):
        connection = http.client.HTTPConnection(*address, timeout=60)
        data = json.dumps(cases[index % len(cases)][0])
        barrier.wait()
        try:
            connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            what = str(answer.status)
        except OSError as error:
            what = type(error).__name__
        with lock:
            seen[what] += 1

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(BURST)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(seen)


def health(address):
    connection = http.client.HTTPConnection(*address, timeout=300)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())


def idle(address, seconds=30):
    """Whether all slots get free."""
    for _ in range(seconds * 10):
        now = health(address)
        if (now["running"], now["waiting"], now["tickets"]) == (0, 0, 96):
            return True
        time.sleep(0.1)
    return False


def run(seconds: float, questions: int, dtype: str) -> dict:
    cases = make_cases(questions, dtype)
    command = [sys.executable, "-m", "visualrwkv.cli", "serve", "--port", "0", "--slots", "32", "--queue", "64"]
    command += ["--dtype", dtype]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", server.stderr.readline())[1])
        address = ("127.0.0.1", port)
        health(address)  # connections wait until the model is loaded
        load(address, cases, 1, min(3, seconds), 0)  # warm
        alone, alone_s = load(address, cases, 1, max(5, seconds / 6), 0)
        crowd, crowd_s = load(address, cases, CLIENTS, seconds, KILLED)
        freed = idle(address)
        statuses = burst(address, cases)
        after, _ = load(address, cases, 1, 1, 0)
    finally:
        server.terminate()
        server.wait(30)
    waits = sorted(crowd.waits)
    one, many = alone.seen["right"] / alone_s, crowd.seen["right"] / crowd_s
    problems = {
        name: count
        for tally in (alone, crowd, after)
        for name, count in tally.seen.items()
        if name not in ("right", "left")
    }
    return {
        "seconds": seconds,
        "dtype": dtype,
        "clients": CLIENTS,
        "questions": questions,
        "answers": crowd.seen["right"],
        "clients killed": crowd.seen["left"],
        "lost, wrong or failed": problems,
        "answers a second": round(many, 2),
        "tokens a second": round(crowd.tokens / crowd_s, 1),
        "answers a second, one after another": round(one, 2),
        "tokens a second, one after another": round(alone.tokens / alone_s, 1),
        "times one after another": round(many / one, 2),
        "median wait s": round(waits[len(waits) // 2], 3),
        "longest wait s": round(waits[-1], 3),
        "all slots free afterwards": freed,
        f"statuses of {BURST} requests at once": statuses,
        "within limits": not problems and freed and set(statuses) <= {"200", "429"} and many >= LIMIT * one,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="of load (default 120)")
    parser.add_argument("--questions", type=int, default=48, help="that clients choose among (default 48)")
    parser.add_argument("--dtype", default="auto", help="of the server (default auto: that of the embedded model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_load.json")
    options = parser.parse_args()
    results = run(options.seconds, options.questions, options.dtype)
    for name, value in results.items():
        print(f"{name:38} {value}")
    options.out.write_text(json.dumps(surroundings() | {"results": results}, indent=2) + "\n")
    return 0 if results["within limits"] else 1


if __name__ == "__main__":
    sys.exit(main())
