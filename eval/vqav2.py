"""VQA v2: open-ended questions about COCO pictures, ten references each."""

import sys
from sys import intern

from visualrwkv.errors import InputError
from visualrwkv.eval.common import SHORT, Benchmark, Question, understood, write_json
from visualrwkv.eval.normalise import evalai, punctuation, soft_accuracy, spaces, vqa
from visualrwkv.eval.scores import mean_scores

ORIGIN = "VQA v2 (visualqa.org)"
_QUESTIONS = {
    "val": "v2_OpenEnded_mscoco_val2014_questions.json",
    "test-dev": "v2_OpenEnded_mscoco_test-dev2015_questions.json",
    "test": "v2_OpenEnded_mscoco_test2015_questions.json",
}
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def _slim(record):
    """Of the ten answers only the words are kept: two million objects become shared strings."""
    return intern(record["answer"]) if "answer_confidence" in record else record


def _same(text):
    return text


def _official_2021(prediction, references):
    """Matches and references; where all ten agree nothing is normalised, which is part of the metric."""
    references = [spaces(reference) for reference in references]
    prediction = spaces(prediction)
    if len(set(references)) > 1:
        references, prediction = [vqa(reference) for reference in references], vqa(prediction)
    return references.count(prediction)


def _official_2017(prediction, references):
    """References lose their punctuation only, so those with capitals, articles or number words never match."""
    if len(set(references)) > 1:
        references = [punctuation(reference) for reference in references]
    return references.count(vqa(spaces(prediction)))


def _both(prediction, references):
    prediction = vqa(prediction)
    return sum(vqa(reference) == prediction for reference in references)


class VQAv2(Benchmark):
    """Soft accuracy over ten references; val is scored here, test-dev and test by the server."""

    name = "vqav2"
    title = "VQA v2"
    splits = {
        "val": ("questions.jsonl",),
        "test-dev": ("llava_vqav2_mscoco_test-dev2015.jsonl",),
        "test": ("llava_vqav2_mscoco_test2015.jsonl",),
    }
    folders = ("val2014", "test2015", "images", ".")
    protocols = {
        "official": "official evaluator of 2021 on exported answers, as the test-dev server does",
        "official-raw": "official evaluator of 2021 on answers as they are",
        "official-2017": "official evaluator of 2017 on exported answers",
        "visualrwkv": "VisualRWKV's val scorer: the evaluator of 2017 on answers as they are",
        "lmms-eval": "lmms-eval's vqav2_val: both sides normalised",
    }
    _rules = {
        "official": (evalai, _official_2021),
        "official-raw": (_same, _official_2021),
        "official-2017": (evalai, _official_2017),
        "visualrwkv": (_same, _official_2017),
        "lmms-eval": (_same, _both),
    }

    def official(self, split):
        return (_QUESTIONS[split],)

    def convert(self):
        path, content = self.read(_QUESTIONS[self.split], origin=ORIGIN, what="a question file of VQA v2")
        self.source = path
        with understood(path, "a question file of VQA v2"):
            subset = "val2014" if self.split == "val" else "test2015"
            for record in content["questions"]:
                image = f"COCO_{subset}_{record['image_id']:012d}.jpg"
                yield Question(record["question_id"], record["question"] + SHORT, image)

    def gold(self, questions):
        if self.split != "val":
            raise InputError(f"the answers of {self.split} are not public; use `visualrwkv export {self.name}`")
        what = "an annotation file of VQA v2"
        path, content = self.read(_ANNOTATIONS, origin=ORIGIN, what=what, hook=_slim)
        with understood(path, what):
            by_id = {}
            for record in content["annotations"]:
                if not isinstance(record["answers"][0], str):
                    raise ValueError(f"the answers of question {record['question_id']} lack answer_confidence")
                kinds = intern(record["answer_type"]), intern(record["question_type"])
                by_id[record["question_id"]] = (record["answers"], *kinds)
        for question in questions:
            if question.id not in by_id:
                raise InputError(f"{path}: no annotation of question {question.id}, which {self.source} asks; "
                                 "pass the annotations of the same split")  # fmt: skip
        return [by_id[question.id] for question in questions]

    def judge(self, questions, gold, answers, protocol, seed=0):
        prepare, matches = self._rules[protocol]
        points = [
            0.0 if answer is None else soft_accuracy(matches(prepare(answer), references), len(references))
            for answer, (references, *_) in zip(answers, gold, strict=True)
        ]
        breakdowns = {"answer type": [kind for _, kind, _ in gold], "question type": [kind for *_, kind in gold]}
        return mean_scores("accuracy", points, answers, breakdowns, seed=seed)

    def export(self, questions, answers, out):
        """All ids of the question file, as the server demands; a test-dev run leaves the rest of test empty."""
        if self.split == "test" and self.has("test-dev"):
            dev = {question.id for question in VQAv2(self.data, split="test-dev").questions()}
            missing = [q.id for q, answer in zip(questions, answers, strict=True) if answer is None and q.id in dev]
            if missing:
                print(f"{out}: {len(missing)} answers of test-dev are empty (first: id {missing[0]})", file=sys.stderr)
        if self.split == "test-dev":
            print(
                f"{out}: holds test-dev alone, and the server takes all ids of test; put {_QUESTIONS['test']} (or "
                f"{self.splits['test'][0]}) into {self.data} for a file that it accepts",
                file=sys.stderr,
            )
        records = zip(questions, answers, strict=True)
        write_json(out, [{"question_id": q.id, "answer": "" if a is None else evalai(a)} for q, a in records])
