"""POPE: is there such an object in the picture? Three ways to choose the objects that are not."""

import numpy as np

from visualrwkv.errors import InputError
from visualrwkv.eval.common import SHORT, Benchmark, Question, json_lines, read_lines, understood, write_text
from visualrwkv.eval.predictions import first_line
from visualrwkv.eval.scores import Scores, bootstrap, ratio

CATEGORIES = ("adversarial", "popular", "random")
_NO = {"No", "no", "not"}
_OPPOSITE = {"yes": "no", "no": "yes"}
_FIRST_ID = {"adversarial": 0, "popular": 10_000_000, "random": 20_000_000}  # the LLaVA pack counts from here


def paper_parse(text):
    """A word No, no or not before the first full stop is "no"; anything else, nothing included, is "yes"."""
    parts = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if _NO & set(parts) else "yes"


def lmms_parse(text):
    """The whole text, in any case."""
    text = text.strip().lower()
    return text if text in ("yes", "no") else None


class POPE(Benchmark):
    """Mean F1 of the three categories. The n-th question of a category belongs to the n-th line of its label file."""

    name = "pope"
    title = "POPE"
    splits = {"test": ("llava_pope_test.jsonl", "questions.jsonl")}
    folders = ("val2014", "images", "test2014", ".")
    protocols = {"paper": "official scorer: no, not or yes", "lmms-eval": "the whole text must be yes or no"}
    _rules = {"paper": paper_parse, "lmms-eval": lmms_parse}

    def official(self, split):
        return ("coco/coco_pope_random.json", "coco_pope_random.json")

    def _labels(self):
        """{category: (path, records)}."""
        result = {}
        for category in CATEGORIES:
            name = f"coco_pope_{category}.json"
            path = self.find(f"coco/{name}", name, origin="POPE (its repository, output/coco)")
            result[category] = path, list(read_lines(path))
        return result

    def convert(self):
        for category, (path, records) in self._labels().items():
            self.source = path
            with understood(path, "a label file of POPE"):
                for number, record in enumerate(records, 1):
                    yield Question(_FIRST_ID[category] + number, record["text"] + SHORT, record["image"], category)

    def scored(self):
        return self.questions()  # ids are those of the question file

    def numbered(self, questions):
        numbered = super().numbered(questions)
        for question in numbered:
            if question.category not in CATEGORIES:
                raise InputError(
                    f"{self.source}: the category of id {question.id} is {question.category!r}; take the question file "
                    "of POPE's own categories"
                )
        return numbered

    def gold(self, questions):
        labels = self._labels()
        lines = {category: iter(records) for category, (_, records) in labels.items()}
        result = []
        for question in questions:
            path = labels[question.category][0]
            label = next(lines[question.category], None)
            with understood(path, "a label file of POPE"):
                if label is None or label["image"] != question.image or label["text"].strip() != first_line(question):
                    raise InputError(
                        f"{path}: its line for id {question.id} of {self.source} is about another picture or question; "
                        "take question file and label files of the same POPE revision (8,910 or 9,000 questions)"
                    )
                if label["label"] not in _OPPOSITE:
                    raise InputError(f"{path}: the label of id {question.id} is {label['label']!r}, not yes or no")
                result.append(label["label"])
        left = {category: sum(1 for _ in rest) for category, rest in lines.items()}
        if any(left.values()):
            category = max(left, key=left.get)
            raise InputError(
                f"{labels[category][0]}: holds {left[category]} questions more than {self.source}; take files of the "
                "same POPE revision (8,910 or 9,000 questions)"
            )
        return result

    def judge(self, questions, gold, answers, protocol, seed=0):
        rule = self._rules[protocol]
        rows = np.zeros((len(questions), len(CATEGORIES), 5))  # TP, FP, TN, FN, questions
        points = []
        for row, question, label, answer in zip(rows, questions, gold, answers, strict=True):
            said = _OPPOSITE[label] if answer is None else rule(answer)
            counts = row[CATEGORIES.index(question.category)]
            counts[4] = 1
            if said is not None:
                counts[("yes", "no").index(said) * 2 + (said != label)] = 1
            points.append(float(said == label))
        totals = rows.sum(0)
        groups = {name: _numbers(*totals[i]) for i, name in enumerate(CATEGORIES) if totals[i, 4]}
        mean = {key: float(np.mean([group[key] for group in groups.values()])) for key in _MEANS}
        present = [i for i in range(len(CATEGORIES)) if totals[i, 4]]

        def mean_f1(sums):
            tp, fp, _, fn, _ = np.moveaxis(sums.reshape(len(sums), len(CATEGORIES), 5)[:, present], 2, 0)
            return 100 * ratio(2 * tp, 2 * tp + fp + fn).mean(1)

        interval = bootstrap(rows.reshape(len(rows), -1), mean_f1, seed)
        values = {key: value for key, value in mean.items() if key != "F1"}
        return Scores("F1", mean["F1"], interval, values, {"category": groups}, points)

    def export(self, questions, answers, out):
        """A folder with the answer files of the official scorer, in the order of the labels."""
        lines = {category: [] for category in CATEGORIES}
        for question, answer in zip(questions, answers, strict=True):
            lines[question.category].append({"question": first_line(question), "answer": answer or ""})
        for category, records in lines.items():
            write_text(f"{out}/coco_pope_{category}_answers.json", json_lines(records))


_MEANS = ("accuracy", "precision", "recall", "F1", "yes ratio")


def _numbers(tp, fp, tn, fn, count):
    """Percentages of one category; what would divide by zero is 0."""
    percent = {
        "accuracy": (tp + tn, count),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "F1": (2 * tp, 2 * tp + fp + fn),
        "yes ratio": (tp + fp, count),
    }
    numbers = {"questions": int(count), "TP": int(tp), "FP": int(fp), "TN": int(tn), "FN": int(fn)}
    return numbers | {name: 100 * float(ratio(*pair)) for name, pair in percent.items()}
