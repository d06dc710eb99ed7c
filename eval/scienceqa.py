"""ScienceQA: multiple-choice school problems, about half of them with a picture."""

import re
from pathlib import Path

import numpy as np

from visualrwkv.eval.common import LETTERS, OPTION, Benchmark, Question, letters, understood, write_json
from visualrwkv.eval.normalise import option_letter
from visualrwkv.eval.scores import mean_scores

ORIGIN = "ScienceQA (data/scienceqa of its repository)"
_PHRASE = re.compile(r"The answer is ([A-Z]).")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LOWER_GRADES = {f"grade{number}" for number in range(1, 7)}


def paper_letter(text, options):
    """The letter by VisualRWKV's and LLaVA's rule: case-sensitive, nothing stripped; None if there is none."""
    letter = None
    if text in LETTERS and len(text) == 1:
        letter = text
    elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = _PHRASE.findall(text)
        letter = found[0] if len(found) == 1 else None
    return letter if letter in options else None


def lmms_letter(text, options):
    """lmms-eval: the letter alone in any case, or a capital letter and a full stop at the start."""
    if text.strip().upper() in options:
        return text.strip().upper()
    return text[0] if text[1:2] == "." and text[0] in options else None


class ScienceQA(Benchmark):
    """Accuracy over the problems with a picture is the number of papers; a reply without a clear letter is wrong."""

    name = "scienceqa"
    title = "ScienceQA"
    splits = {"test": ("llava_test_CQM-A.json",), "val": (), "minitest": (), "minival": ()}
    folders = ("images/test", "test", "images", "images/val", "val", ".")
    settings = {"sqa_suffix": ("none", "option")}
    protocols = {
        "paper": "VisualRWKV: unclear or missing is wrong",
        "lmms-eval": "lmms-eval: a letter in any case",
        "vlmevalkit": "VLMEvalKit: exact matching",
    }
    _rules = {"paper": paper_letter, "lmms-eval": lmms_letter, "vlmevalkit": option_letter}

    exported = Benchmark.scored  # the file takes more than questions from the official files

    def official(self, split):
        return ("problems.json",)

    def from_pack(self, records):
        for record in records:
            text = record["conversations"][0]["value"]  # the second turn holds the answer and is never read
            yield Question(record["id"], self._suffixed(text), record.get("image"))

    def _suffixed(self, text):
        return text + OPTION if self.chosen["sqa_suffix"] == "option" else text

    def _problems(self):
        """(id, problem) of the split."""
        path, problems = self.read("problems.json", origin=ORIGIN, what="ScienceQA's problems.json")
        splits_path, splits = self.read("pid_splits.json", origin=ORIGIN, what="ScienceQA's pid_splits.json")
        self.source = splits_path
        with understood(splits_path, f"ScienceQA's pid_splits.json with the split {self.split}"):
            ids = splits[self.split]
        with understood(path, "the problems.json that pid_splits.json is about"):
            return [(id, problems[id]) for id in ids]

    def convert(self):
        for id, problem in self._problems():
            with understood(self.data / "problems.json", f"ScienceQA's problems.json (problem {id})"):
                hint = f"Context: {problem['hint']}\n" if problem["hint"] else ""
                text = self._suffixed(hint + problem["question"] + letters(problem["choices"]))
                yield Question(id, text, f"{id}/{problem['image']}" if problem["image"] else None)

    def gold(self, questions):
        problems = self._problems()
        with understood(self.data / "problems.json", "ScienceQA's problems.json with answers"):
            for id, problem in problems:
                if problem["answer"] not in range(min(len(problem["choices"]), len(LETTERS))):
                    raise ValueError(f"the answer of {id} is {problem['answer']!r}, which is none of its choices")
                for name in ("subject", "grade", "topic"):
                    if not isinstance(problem[name], str):
                        raise ValueError(f"the {name} of {id} is {problem[name]!r}, not a text")
        return [problem for _, problem in problems]

    def letters(self, gold, answers, protocol="paper"):
        """The letter of each answer, None where it is missing or unclear."""
        rule = self._rules[protocol]
        return [
            None if answer is None else rule(answer, dict(zip(LETTERS, problem["choices"], strict=False)))
            for answer, problem in zip(answers, gold, strict=True)
        ]

    def judge(self, questions, gold, answers, protocol, seed=0):
        chosen = self.letters(gold, answers, protocol)
        points = [float(letter == LETTERS[problem["answer"]]) for letter, problem in zip(chosen, gold, strict=True)]
        breakdowns = {
            "subject": [_SUBJECTS.get(problem["subject"], problem["subject"]) for problem in gold],
            "context": [_context(problem) for problem in gold],
            "grade": ["G1-6" if problem["grade"] in _LOWER_GRADES else "G7-12" for problem in gold],
            "topic": [problem["topic"] for problem in gold],
        }
        pictured = [bool(problem["image"]) for problem in gold]
        scores = mean_scores("IMG accuracy", points, answers, breakdowns, counted=pictured, seed=seed)
        scores.values["accuracy"] = 100 * float(np.mean(points))
        return scores

    def export(self, questions, answers, out):
        """The result file that the official breakdown tool reads, in which unclear is -1, and beside it the analysis:
        which answers are right and which wrong."""
        gold = self.gold(questions)
        chosen = self.letters(gold, answers)
        results = {
            question.id: -1 if letter is None else LETTERS.index(letter)
            for question, letter in zip(questions, chosen, strict=True)
        }
        correct = sum(results[q.id] == problem["answer"] for q, problem in zip(questions, gold, strict=True))
        outputs = {q.id: answer for q, answer in zip(questions, answers, strict=True) if answer is not None}
        head = {"acc": correct / len(gold) * 100, "correct": correct, "count": len(gold)}
        write_json(out, head | {"results": results, "outputs": outputs}, indent=1)
        analysis = {"correct": [], "incorrect": []}
        for question, problem, letter, answer in zip(questions, gold, chosen, answers, strict=True):
            right = LETTERS[problem["answer"]]
            entry = {"question_id": question.id, "parsed": letter, "answer": right, "text": answer}
            analysis["correct" if letter == right else "incorrect"].append(entry)
        out = Path(out)
        write_json(out.with_name(f"{out.stem}_analysis.json"), analysis, indent=1)


def _context(problem):
    """TXT and IMG overlap; NO has neither."""
    kinds = tuple(name for name, there in (("TXT", problem["hint"]), ("IMG", problem["image"])) if there)
    return kinds or ("NO",)
