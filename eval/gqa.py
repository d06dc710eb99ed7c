"""GQA: compositional questions made from scene graphs."""

import string
from collections import Counter, defaultdict

import numpy as np

from visualrwkv.eval.common import SHORT, Benchmark, Question, understood, write_json
from visualrwkv.eval.scores import group_means, mean_scores

_FILE = "testdev_balanced_questions.json"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NOT_A_STEP = ("exist", "query: name", "choose name")


def exported(text):
    """The official form: lower case, without full stops at the end; nothing else is stripped."""
    return text.rstrip(".").lower()


class GQA(Benchmark):
    """Exact match with the one official answer, over the balanced questions."""

    name = "gqa"
    title = "GQA"
    splits = {"testdev": ("llava_gqa_testdev_balanced.jsonl",)}
    folders = ("images", "images/gqa/images", ".")
    protocols = {
        "official": "official evaluator: exact match after export",
        "lmms-eval": "exact match ignoring case and punctuation",
        "vlmevalkit": "equality ignoring case",
    }
    note = "The GPT-extended answer lists that VisualRWKV's scorer took in May 2024 are not public and not used."

    def official(self, split):
        return (_FILE,)

    def _records(self):
        what = "a question file of GQA"
        path, content = self.read(_FILE, origin="GQA (cs.stanford.edu/people/dorarad/gqa)", what=what)
        self.source = path
        with understood(path, what):
            return path, list(content.items())

    def convert(self):
        path, records = self._records()
        with understood(path, "a question file of GQA"):
            for id, record in records:
                yield Question(id, record["question"] + SHORT, f"{record['imageId']}.jpg")

    def gold(self, questions):
        path, records = self._records()
        with understood(path, "a question file of GQA with answers"):
            for id, record in records:
                _ = record["isBalanced"], _steps(record), record["question"].split()
                kinds = record["types"]["structural"], record["types"]["semantic"]
                if not all(isinstance(text, str) for text in (record["answer"], *kinds)):
                    raise ValueError(f"an answer or a type of {id} is no text")
                if not isinstance(record["groups"]["global"], (str, type(None))):
                    raise ValueError(f"the global group of {id} is no text")
            if not any(record["isBalanced"] for _, record in records):
                raise ValueError("none of its questions is balanced, and the score is about those that are")
        return [record for _, record in records]

    def judge(self, questions, gold, answers, protocol, seed=0):
        kept = [index for index, record in enumerate(gold) if record["isBalanced"]]
        records, texts = [gold[i] for i in kept], [answers[i] for i in kept]
        rule = {"official": _official, "lmms-eval": _lmms, "vlmevalkit": _folded}[protocol]
        points = [float(text is not None and rule(text, r["answer"])) for text, r in zip(texts, records, strict=True)]
        types = [record["types"] for record in records]
        open_or_binary = ["open" if kind["structural"] == "query" else "binary" for kind in types]
        breakdowns = {
            "structural type": [kind["structural"] for kind in types],
            "semantic type": [kind["semantic"] for kind in types],
            "steps": [_steps(record) for record in records],
            "words": [len(record["question"].split()) for record in records],
        }
        scores = mean_scores("accuracy", points, texts, breakdowns, seed=seed)
        scores.values |= {name: group["score"] for name, group in group_means(points, open_or_binary).items()}
        scores.values["distribution"] = _distribution(records, texts)
        by_place = dict(zip(kept, scores.points, strict=True))
        scores.points = [by_place.get(index) for index in range(len(gold))]
        return scores

    def export(self, questions, answers, out):
        pairs = zip(questions, answers, strict=True)
        write_json(out, [{"questionId": str(q.id), "prediction": exported(a)} for q, a in pairs if a is not None])


def _official(text, answer):
    return exported(text) == answer


def _lmms(text, answer):
    return text.lower().translate(_NO_PUNCTUATION) == answer.lower().translate(_NO_PUNCTUATION)


def _folded(text, answer):
    return text.strip().lower() == answer.lower()


def _steps(record):
    """Semantic operations that are more than asking for existence or a name."""
    steps = (f"{step['operation']}: {step['argument']}" for step in record["semantic"])
    return sum(not any(word in step for word in _NOT_A_STEP) for step in steps)


def _distribution(records, texts):
    """Chi-square of predicted against true answers by global group, weighted by group size, over 100; low is good."""
    gold, predicted = defaultdict(Counter), defaultdict(Counter)
    for record, text in zip(records, texts, strict=True):
        group = record["groups"]["global"]
        if group is not None:
            gold[group][record["answer"]] += 1
            predicted[group][exported(text or "")] += 1
    if not gold:
        return 0.0
    sizes = [sum(counts.values()) for counts in gold.values()]
    squares = [sum((predicted[g][a] - n) ** 2 / n for a, n in counts.items()) for g, counts in gold.items()]
    return float(np.average(squares, weights=sizes)) / 100
