"""MMBench: multiple choice, asked again with the options rotated; the pictures are in the TSV."""

import base64
import csv
import io
import re
from collections import defaultdict
from functools import cached_property

from visualrwkv.eval.common import LETTERS, OPTION, Benchmark, Question, letters, understood, write_text
from visualrwkv.eval.normalise import option_letter
from visualrwkv.eval.scores import group_means, mean_scores
from visualrwkv.eval.sheets import write_xlsx

ROTATION = 1_000_000  # rotation k of question i has the index i + k * ROTATION
_LEFT_OUT = {"hint", "category", "source", "image", "comment", "l2-category"}
_PREDICTION_COLUMN = 6


class MMBench(Benchmark):
    """A question counts if every rotation of it is answered rightly ("circular").

    The server reads letters with the help of a language model where plain matching finds none, so it can only give
    more than the local score.
    """

    name = "mmbench"
    title = "MMBench"
    folder = "mmbench"
    splits = {"dev": (), "test": ()}
    protocols = {"circular": "every rotation right, letters by VLMEvalKit's exact matching"}
    suffix = OPTION
    files = {"dev": "mmbench_dev_20230712.tsv", "test": "mmbench_test_20230712.tsv"}
    chinese = False

    def official(self, split):
        """The legacy file, or one of a newer release, whose names differ: MMBench_DEV_EN.tsv, mmbench_dev_cn_...tsv."""
        others = (path.name for path in sorted(self.data.glob("*.tsv")))
        return tuple(dict.fromkeys((self.files[split], *filter(lambda name: self._is_of(split, name), others))))

    def _is_of(self, split, name):
        parts = re.split(r"[\W_]+", name.lower())
        return parts[0] == "mmbench" and split in parts and ("cn" in parts) == self.chinese

    def questions(self):
        """Of the TSV alone, which `questions` of the constructor may name: the pictures are in it."""
        return self.numbered(self.convert())

    def _rows(self):
        """(byte offset, {column: text}) of every row; the picture is left where it is."""
        path = self._questions or self.find(*self.official(self.split), origin=f"{self.title} (opencompass)")
        self.source = path
        with understood(path, "a TSV file of MMBench"):
            with open(path, "rb") as file:
                lines = _Lines(file)
                rows = csv.reader(lines, delimiter="\t")
                csv.field_size_limit(1 << 30)
                header = next(rows, [""])
                header[0] = header[0].removeprefix("\ufeff")
                if not {"index", "question", "A", "B"} <= set(header):
                    raise ValueError(f"its columns are {', '.join(header)[:100]}")
                start = lines.read
                for row in rows:
                    cells = dict(zip(header, row, strict=True))
                    cells.pop("image", None)
                    yield start, cells
                    start = lines.read

    def convert(self):
        for offset, row in self._rows():
            with understood(self.source, "a TSV file of MMBench"):
                hint = "" if row.get("hint", "").lower() in ("", "nan", "none") else row["hint"] + "\n"
                yield Question(int(row["index"]), hint + row["question"] + letters(options(row)) + self.suffix, offset)

    def picture(self, question):
        """The bytes of a picture; a rotated row of the newer files names the row that has it."""
        with understood(self.source, f"a TSV file of MMBench with the picture of row {question.id}"):
            image = self._image(question.image)
            if 0 < len(image) < 32 and image.isdigit():
                if int(image) not in self._offsets:
                    raise ValueError(f"it is said to be in row {image}, which is not there")
                image = self._image(self._offsets[int(image)])
            if not image:
                raise ValueError("the cell is empty")
            return base64.b64decode(image)

    @cached_property
    def _offsets(self):
        return {int(row["index"]): offset for offset, row in self._rows()}

    def _image(self, offset):
        with open(self.source, "rb") as file:
            header = next(csv.reader(io.StringIO(file.readline().decode("utf-8-sig")), delimiter="\t"))
            file.seek(offset)
            row = next(csv.reader(_Lines(file), delimiter="\t"))
            return dict(zip(header, row, strict=True))["image"]

    def gold(self, questions):
        rows = [row for _, row in self._rows()]
        with understood(self.source, "a TSV file of MMBench with answers"):
            for row in rows:
                if row["answer"] not in LETTERS or not row["answer"]:
                    raise ValueError(f"the answer of {row['index']} is {row['answer']!r}; export the test split")
            if all(int(row["index"]) >= ROTATION for row in rows):
                raise ValueError("all of its questions are rotations of others")
        return rows

    def judge(self, questions, gold, answers, protocol, seed=0):
        hits = [
            float(answer is not None and letter_of(answer, row) == row["answer"])
            for answer, row in zip(answers, gold, strict=True)
        ]
        rotations = defaultdict(list)  # index of the first pass -> positions
        for position, question in enumerate(questions):
            rotations[question.id % ROTATION].append(position)
        groups = list(rotations.values())
        points = [min(hits[place] for place in places) for places in groups]
        first = [gold[places[0]] for places in groups]
        complete = [None if any(answers[p] is None for p in places) else "" for places in groups]
        breakdowns = {name: [row.get(name) or "none" for row in first] for name in ("l2-category", "category")}
        scores = mean_scores("circular accuracy", points, complete, breakdowns, seed=seed)
        passes = ["first" if question.id < ROTATION else "again" for question in questions]
        scores.values["vanilla accuracy, first pass"] = group_means(hits, passes)["first"]["score"]
        scores.values["vanilla accuracy, all rows"] = 100 * sum(hits) / len(hits)
        scores.points, scores.unit = hits, "questions with their rotations"
        return scores

    def export(self, questions, answers, out):
        """The upload sheet: the rows without pictures and categories, the prediction as 7th column."""
        table = []
        for (_, row), answer in zip(self._rows(), answers, strict=True):
            kept = [(name, cell) for name, cell in row.items() if name not in _LEFT_OUT]
            if "answer" not in row:
                kept.insert(_PREDICTION_COLUMN, ("answer", ""))
            kept.insert(_PREDICTION_COLUMN, ("prediction", answer or ""))
            table = table or [[name for name, _ in kept]]
            table.append([int(cell) if name == "index" else cell for name, cell in kept])
        write_text(out, write_xlsx(table))


def options(row):
    """The texts of the options, up to the first that is absent."""
    found = []
    for letter in LETTERS[:4]:
        if not row.get(letter):
            break
        found.append(row[letter])
    return found


def letter_of(answer, row):
    """The letter that an answer chooses among the options of its row."""
    return option_letter(answer, dict(zip(LETTERS, options(row), strict=False)))


class _Lines:
    """Lines of a binary file as text, counting the bytes."""

    def __init__(self, file):
        self.file, self.read = file, file.tell()

    def __iter__(self):
        return self

    def __next__(self):
        line = self.file.readline()
        if not line:
            raise StopIteration
        self.read += len(line)
        return line.decode()
