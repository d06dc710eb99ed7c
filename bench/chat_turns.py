"""50 turns in one conversation: time per token and memory of the last turn against the second.

    python -m bench.chat_turns                 # writes bench/results/chat_turns.json

The embedded model, a drawn scene in the first turn, the same question and the same number of tokens in every further
one (a stop at the end of a reply would compare replies of different length). A turn's time per token is the smallest of
`--repeats` measurements, for each of which the turn is taken back and said again; it is processor time of one thread,
since on a shared machine the clock on the wall tells about the others. The wall's is written down beside it.
"""

import argparse
import sys
import time
from pathlib import Path

from bench.report import RESULTS, resident, save, show

LIMIT = 0.10  # last turn against the second
TURNS = 50
TOKENS = 24
QUESTION = "How many objects are there?"


def run(repeats: int) -> dict:
    import torch

    import visualrwkv
    from visualrwkv.scenes import draw, sample_scene, scene_rng

    torch.set_num_threads(1)
    vlm = visualrwkv.load()
    rng = scene_rng(2, "test", 0)
    picture = draw(sample_scene(rng, split="test"))
    # the same count of tokens in each turn: with this temperature the seed alone chooses them
    options = {"max_new_tokens": TOKENS, "temperature": 100.0}
    chat = vlm.chat()
    chat.say(QUESTION, images=picture, seed=0, **options)
    turns = []
    for _ in range(TURNS - 1):
        best, wall, tokens = float("inf"), float("inf"), 0
        for repeat in range(repeats):
            if repeat:
                chat.undo()
            start, worked = time.perf_counter(), time.process_time()
            chat.say(QUESTION, seed=0, **options)
            seconds, work = time.perf_counter() - start, time.process_time() - worked
            tokens = chat.stats.prompt_tokens + chat.stats.reply_tokens
            best, wall = min(best, work / tokens), min(wall, seconds / tokens)
        turns.append({"tokens": tokens, "ms a token": best * 1000, "wall": wall * 1000, "state": chat.nbytes,
                      "resident": resident("VmRSS")})  # fmt: skip
    second, last = turns[0], turns[-1]
    time_ratio, memory_ratio = last["ms a token"] / second["ms a token"], last["resident"] / second["resident"]
    return {
        "turns": TURNS,
        "repeats": repeats,
        "positions read": chat.tokens_read,
        "state bytes of turn 2": second["state"],
        "state bytes of the last turn": last["state"],
        "ms a token, turn 2": round(second["ms a token"], 3),
        "ms a token, last turn": round(last["ms a token"], 3),
        "time, last / second": round(time_ratio, 3),
        "wall ms a token, turn 2": round(second["wall"], 3),
        "wall ms a token, last turn": round(last["wall"], 3),
        "tokens of turn 2 and of the last turn": [second["tokens"], last["tokens"]],
        "resident MiB, turn 2": round(second["resident"] / 2**20, 1),
        "resident MiB, last turn": round(last["resident"] / 2**20, 1),
        "memory, last / second": round(memory_ratio, 3),
        "within limits": time_ratio < 1 + LIMIT and memory_ratio < 1 + LIMIT and last["state"] == second["state"],
        "ms a token of all turns": [round(turn["ms a token"], 3) for turn in turns],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each turn (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "chat_turns.json")
    options = parser.parse_args()
    results = run(options.repeats)
    show(results, 28)
    save(results, options.out)
    return 0 if results["within limits"] else 1


if __name__ == "__main__":
    sys.exit(main())
