"""MME: two yes/no questions about each picture, in 14 categories."""

import re
from collections import defaultdict
from contextlib import suppress

import numpy as np

from visualrwkv.errors import InputError
from visualrwkv.eval.common import SHORT, Benchmark, Question, understood, write_text
from visualrwkv.eval.scores import Scores, bootstrap, ratio

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
CATEGORIES = PERCEPTION + COGNITION
_ROOT = "MME_Benchmark_release_version"
_SENTENCE = re.compile(r"\s*Please answer yes or no\.\s*$")
_PICTURES = (".jpg", ".png", ".jpeg")


def paper_parse(text):
    """The whole text is "yes" or "no", or its first four characters hold one of them; else "other"."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def lmms_parse(text):
    """The same after stripping and without full stops; y and n count."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or paper_parse(text)


class MME(Benchmark):
    """Perception score: over its ten categories the sum of accuracy and of pictures with both questions right."""

    name = "mme"
    title = "MME"
    folder = "MME"
    splits = {"test": ("llava_mme.jsonl", "questions.jsonl")}
    folders = (_ROOT, "images", ".")
    protocols = {"paper": "official calculation tool", "lmms-eval": "stripped, without full stops, y and n count"}
    _rules = {"paper": paper_parse, "lmms-eval": lmms_parse}

    exported = Benchmark.scored  # the file takes more than questions from the official files

    def official(self, split):
        return (_ROOT,)

    def key(self, id):
        """Category and name of the picture; extension and folder in between depend on the layout."""
        category, _, file = str(id).partition("/")
        return f"{category}/{file.removeprefix('images/').rpartition('.')[0] or file}"

    def _records(self):
        """(category, name of the text file, its folder, question, Yes or No), two for each picture."""
        root = self.find(_ROOT, origin="MME (its release)")
        self.source = root
        for category in CATEGORIES:
            folder = root / category
            texts = folder / "questions_answers_YN"
            for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
                with understood(path, "a question file of MME"):
                    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
                    if len(lines) != 2:
                        raise ValueError(f"it has {len(lines)} lines, not two")
                    for line in lines:
                        question, label = line.split("\t")
                        yield category, path.name, folder, question, label.strip()

    def convert(self):
        for category, file, folder, question, _ in self._records():
            stem = file.removesuffix(".txt")
            places = (place / (stem + end) for place in (folder, folder / "images") for end in _PICTURES)
            image = f"{category}/{next((p.name for p in places if p.exists()), stem + '.jpg')}"
            yield Question(image, _SENTENCE.sub("", question) + SHORT, image, category)

    def picture(self, question):
        category, _, file = question.image.partition("/")
        inner = Question(question.id, question.text, f"{category}/images/{file}")
        try:
            return super().picture(question)
        except InputError:
            with suppress(InputError):
                return super().picture(inner)
            raise

    def gold(self, questions):
        labels = [label for *_, label in self._records()]
        for question, label in zip(questions, labels, strict=True):
            if label not in ("Yes", "No"):
                raise InputError(
                    f"{self.source}/{question.id}: the answer is {label!r}, not Yes or No; repair the file"
                )
        return labels

    def judge(self, questions, gold, answers, protocol, seed=0):
        rule = self._rules[protocol]
        said = ["missing" if answer is None else rule(answer) for answer in answers]
        points = [float(word == label.lower()) for word, label in zip(said, gold, strict=True)]
        pictures = defaultdict(list)  # (category, picture) -> positions of its two questions
        for position, question in enumerate(questions):
            pictures[question.category, self.key(question.id)].append(position)
        rows = np.zeros((len(pictures), len(CATEGORIES), 4))  # right, questions, both right, pictures
        for row, ((category, _), places) in zip(rows, pictures.items(), strict=True):
            right = sum(points[place] for place in places)
            row[CATEGORIES.index(category)] = right, len(places), right == len(places), 1

        def category_scores(sums):
            right, asked, both, shown = np.moveaxis(sums.reshape(-1, len(CATEGORIES), 4), 2, 0)
            return 100 * (ratio(right, asked) + ratio(both, shown))

        totals = rows.sum(0)
        (by_category,) = category_scores(totals.reshape(1, -1))
        groups = {}
        for name, (right, asked, both, shown), score in zip(CATEGORIES, totals, by_category, strict=True):
            if asked:
                other = sum(w == "other" for w, q in zip(said, questions, strict=True) if q.category == name)
                acc, plus = 100 * float(ratio(right, asked)), 100 * float(ratio(both, shown))
                numbers = {"questions": int(asked), "images": int(shown), "acc": acc, "acc+": plus}
                groups[name] = numbers | {"score": float(score), "other": other}
        split = len(PERCEPTION)
        perception, cognition = float(by_category[:split].sum()), float(by_category[split:].sum())
        flat = rows.reshape(len(rows), -1)
        interval = bootstrap(flat, lambda sums: category_scores(sums)[:, :split].sum(1), seed)
        values = {"cognition": cognition, "total": perception + cognition}
        return Scores("perception", perception, interval, values, {"category": groups}, points, unit="pictures")

    def export(self, questions, answers, out):
        """A folder of files for the official tool; a missing answer is empty, which it counts as wrong."""
        texts = {category: "" for category in CATEGORIES}
        for (category, file, _, question, label), answer in zip(self._records(), answers, strict=True):
            # one line each, whatever the tool takes for the end of one
            texts[category] += "\t".join((file, question, label, " ".join((answer or "").split()))) + "\n"
        for category, text in texts.items():
            if text:
                write_text(f"{out}/{category}.txt", text)
