"""`visualrwkv eval` on 2,015 drawn questions: batches of 32 against one question at a time.

    python -m bench.eval_batches               # about ten minutes; writes bench/results/eval_batches.json
    python -m bench.eval_batches --pictures 400 --rounds 1 --out /tmp/batches.json

The command is timed as a user calls it, with the embedded model, in turns. Three parts of a run are timed by
themselves: its start, which is the same command for a single question, the reading of the pictures, and the bare matrix
products of the language model for all prompts, in large batches. A batch saves none of them, so they limit what it can
gain. The exit code is 1 if the answers differ or a batch gains less than it should.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.measure import products_of_prompts
from bench.report import RESULTS, save, show
from visualrwkv.prompt import SHORT_ANSWER, Turn

BATCH = 32
TIMES = 4.0  # as fast as one question at a time
DTYPES = ("float32", "bfloat16")


def visualrwkv(*arguments) -> float:
    """Seconds of a command."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "visualrwkv.cli", *map(str, arguments)], check=True, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def evaluate(data: Path, out: Path, batch: int, dtype: str, shard: str = "0/1") -> tuple[float, dict]:
    """Seconds of a run, and its answers by question."""
    seconds = visualrwkv(
        *("eval", "vqav2", "--data", data, "--out", out, "--batch-size", batch, "--dtype", dtype, "--shard", shard)
    )
    (file,) = out.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return seconds, {line["question_id"]: line["text"] for line in lines}


def read_pictures(data: Path) -> tuple[float, int]:
    """Seconds in which two threads read the pictures and resize them for the model, and how many there are."""
    from visualrwkv import load
    from visualrwkv.image_processing import load_image

    files, processor = sorted((data / "val2014").iterdir()), load().processor.image_processor
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda file: processor(load_image(file), return_tensors="pt"), files):
            pass
    return time.perf_counter() - start, len(files)


def multiply(data: Path, dtype: str) -> float:
    """Seconds of the language model's bare matrix products for all prompts."""
    from visualrwkv import load

    vlm = load(device="cpu", dtype=dtype)
    asked = json.loads((data / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    lengths = []
    for question in asked:
        turn = Turn("user", f"{question['question']}\n{SHORT_ANSWER}", 1)
        lengths.append(len(vlm.processor.encode_turns([turn], open_reply=True)[0]))
    rows = BATCH * round(statistics.mean(lengths))
    return products_of_prompts(vlm.model, rows) * len(asked) / BATCH


def run(folder: Path, pictures: int, rounds: int) -> dict:
    data, seconds, answers = folder / "data", {}, {}
    visualrwkv("scenes", data, "--format", "vqav2", "--pictures", pictures, "--seed", 2)
    questions = len(json.loads((data / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"])
    for turn in range(rounds):
        for dtype in DTYPES:
            for name, batch, shard in (("start", 1, f"0/{questions}"), ("one", 1, "0/1"), ("batch", BATCH, "0/1")):
                key = dtype, name
                took, answers[key] = evaluate(data, folder / f"{turn}_{dtype}_{name}", batch, dtype, shard)
                seconds.setdefault(key, []).append(took)
    reading, files = read_pictures(data)
    mean = {key: statistics.mean(values) for key, values in seconds.items()}
    results = {"questions": questions, "pictures": files, "rounds": rounds, "reading the pictures s": round(reading, 2)}
    for dtype in DTYPES:
        products = multiply(data, dtype)
        start, one, batch = (mean[dtype, name] for name in ("start", "one", "batch"))
        differ = sum(answers[dtype, "batch"][id] != text for id, text in answers[dtype, "one"].items())
        results[dtype] = {
            "batch size 1 s": round(one, 2),
            f"batch size {BATCH} s": round(batch, 2),
            "times": round(one / batch, 2),
            "times, without the start": round((one - start) / (batch - start), 2),
            "start s": round(start, 2),
            "bare matrix products s": round(products, 2),
            "times, if only start and pictures took time": round(one / (start + reading), 2),
            "times, if only these and the products did": round(one / (start + reading + products), 2),
            "answers that differ": differ,
            "within limits": one >= TIMES * batch and not differ,
        }
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=3900, help="scenes, a fifth of them evaluated (default 3900)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, of which the mean counts (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "eval_batches.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), options.pictures, options.rounds)
    show(results, 46, DTYPES)
    save(results, options.out)
    return 0 if all(results[dtype]["within limits"] for dtype in DTYPES) else 1


if __name__ == "__main__":
    sys.exit(main())
