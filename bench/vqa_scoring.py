"""How long scoring VQA v2 val takes, against the reference scorer as a plain loop.

`python -m bench.vqa_scoring FOLDER` makes 214,354 questions in the official layout in FOLDER (if they are not there),
scores made-up predictions with `visualrwkv score` in a process of its own, and prints its seconds and peak memory. With
`--plain` the plain loop below scores them too; the exit code is 1 if the two scores differ.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from bench.report import save, show

QUESTIONS = 214_354
QUESTIONS_FILE = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS_FILE = "v2_mscoco_val2014_annotations.json"
_THINGS = "kettle bus dog cat surfboard pizza frisbee tie clock giraffe umbrella bench train couch truck".split()
_COLOURS = "red blue green white black brown yellow gray orange pink".split()
_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def make(folder, count, seed=0):
    """Questions, annotations and predictions; answers are as mixed as people's: articles, capitals, marks, numbers."""
    rng = random.Random(seed)
    questions, annotations, predictions = [], [], []
    for number in range(count):
        image, thing = number // 5 + 1, rng.choice(_THINGS)
        kind = rng.choices(["yes/no", "number", "other"], [38, 12, 50])[0]
        if kind == "yes/no":
            text, start, right, wrong = f"Is the {thing} wet?", "is the", "yes", "no"
        elif kind == "number":
            text, start = f"How many {thing}s are there?", "how many"
            right, wrong = str(rng.randint(0, 20)), rng.choice(["two", "10", "1,000"])
        else:
            text, start = f"What color is the {thing}?", "what color is the"
            right = f"{rng.choice(_COLOURS)} {rng.choice(['and white', '/ white', 'with a ' + thing, ''])}".strip()
            wrong = rng.choice([f"a {thing}", f"{thing}-like", "I don't know", f"the {rng.choice(_THINGS)} {number}"])
        id = image * 1000 + number % 5
        agreement = rng.choice([1.0, 0.9, 0.6])
        answers = [right if rng.random() < agreement else wrong for _ in range(10)]
        questions.append({"image_id": image, "question": text, "question_id": id})
        annotations.append(
            {
                "question_type": start,
                "multiple_choice_answer": right,
                "answers": [
                    {"answer": answer, "answer_confidence": rng.choice(["yes", "maybe", "no"]), "answer_id": i}
                    for i, answer in enumerate(answers, 1)
                ],
                "image_id": image,
                "answer_type": kind,
                "question_id": id,
            }
        )
        said = rng.choice([right, right.capitalize(), f"{right}.", f"The {right}", wrong])
        prompt = f"User: {text}\n<image>\n{text}\nAnswer the question using a single word or phrase.\n\nAssistant:"
        record = {"question_id": id, "prompt": prompt, "text": said, "model_id": "made-up", "metadata": {}}
        predictions.append(record)
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / QUESTIONS_FILE).write_text(json.dumps({**head, "task_type": "Open-Ended", "questions": questions}))
    (folder / ANNOTATIONS_FILE).write_text(json.dumps({**head, "annotations": annotations}))
    rng.shuffle(predictions)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in predictions))


def plain_score(folder):
    """The evaluator of 2021 on exported answers, step by step as it is described: the yardstick, not the product."""
    from visualrwkv.eval.normalise import CONTRACTIONS

    def punctuation(text):
        result = text
        for mark in _MARKS:
            if mark + " " in text or " " + mark in text or re.search(r"(\d)(,)(\d)", text) is not None:
                result = result.replace(mark, "")
            else:
                result = result.replace(mark, " ")
        return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", result, re.UNICODE)

    def words(text):
        numbers = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
        numbers |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
        kept = [numbers.get(word, word) for word in text.lower().split()]
        kept = [word for word in kept if word not in ("a", "an", "the")]
        return " ".join(CONTRACTIONS.get(word, word) for word in kept)

    def clean(text):
        return text.replace("\n", " ").replace("\t", " ").strip()

    predictions = {}
    with open(folder / "predictions.jsonl") as file:
        for line in file:
            record = json.loads(line)
            text = record["text"].lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
            predictions[record["question_id"]] = words(punctuation(clean(text)))
    accuracies = []
    for annotation in json.loads((folder / ANNOTATIONS_FILE).read_bytes())["annotations"]:
        prediction = clean(predictions[annotation["question_id"]])
        answers = annotation["answers"]
        for answer in answers:
            answer["answer"] = clean(answer["answer"])
        if len({answer["answer"] for answer in answers}) > 1:
            for answer in answers:
                answer["answer"] = words(punctuation(answer["answer"]))
            prediction = words(punctuation(prediction))
        each = []
        for answer in answers:
            others = [item for item in answers if item is not answer]
            each.append(min(1, sum(item["answer"] == prediction for item in others) / 3))
        accuracies.append(sum(each) / len(each))
    return 100 * sum(accuracies) / len(accuracies)


def measure(folder):
    """Score, seconds and peak memory of `visualrwkv score` in a process of its own."""
    call = [sys.executable, "-m", "visualrwkv.cli", "score", "vqav2", "--json", "--data", str(folder)]
    start = time.perf_counter()
    with subprocess.Popen(
        [*call, "--predictions", str(folder / "predictions.jsonl")], stdout=subprocess.PIPE
    ) as process:
        result = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    return {
        "questions": result["questions"],
        "score": round(result["score"], 4),
        "seconds": round(seconds, 1),
        "processor seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak GiB": round(usage.ru_maxrss / 2**20, 2),  # Linux counts KiB
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.vqa_scoring", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", metavar="N", type=int, default=QUESTIONS)
    parser.add_argument("--plain", action="store_true", help="run the plain loop too")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON, usually bench/results/vqa_scoring.json")
    parser.add_argument("--make", action="store_true", help="only make the files")
    options = parser.parse_args(argv)
    if options.make:
        make(options.folder, options.questions)
        return 0
    if not (options.folder / "predictions.jsonl").exists():
        # elsewhere, because a process starts with the peak memory of the one that started it
        again = [sys.executable, "-m", "bench.vqa_scoring", str(options.folder), "--make"]
        subprocess.run([*again, "--questions", str(options.questions)], check=True)
    numbers = measure(options.folder)
    if options.plain:
        start = time.perf_counter()
        numbers["plain loop score"] = round(plain_score(options.folder), 4)
        numbers["plain loop seconds"] = round(time.perf_counter() - start, 1)
    show(numbers, 20)
    if options.out:
        save(numbers, options.out)
    return 0 if numbers.get("plain loop score", numbers["score"]) == numbers["score"] else 1


if __name__ == "__main__":
    sys.exit(main())
