"""What all benchmarks share: questions, the official files and the LLaVA pack, and where things belong."""

import csv
import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from visualrwkv.errors import InputError, one_line
from visualrwkv.prompt import MARKER, SHORT_ANSWER, Turn

SHORT = f"\n{SHORT_ANSWER}"
OPTION = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"


@dataclass(slots=True)
class Question:
    """One question, without anything of its answer.

    Args:
        id: as the question file writes it; not unique in TextVQA and MME.
        text: the user's words with their suffix.
        image: name of the picture inside the picture folder (MMBench: byte offset of its row), None without one.
        category: group that the question file names.
        number: position among the questions with the same id.
    """

    id: int | str
    text: str
    image: str | int | None
    category: str | None = None
    number: int = 0

    def turn(self) -> Turn:
        """The question as a turn for the prompt builder."""
        return Turn("user", self.text.replace(MARKER, ""), images=0 if self.image is None else 1)


class Benchmark:
    """One benchmark over the files of a folder. Subclasses say where files are and how answers are judged.

    Args:
        data: folder with the official files or the LLaVA pack; or the root of VisualRWKV's evaluation folders, which
            holds them in `eval/<folder>`.
        split: one of `splits`; by default the first whose questions are there.
        questions: question file in the LLaVA form, in place of the ones looked for.
        images: picture folder, in place of the ones looked for.
        settings: fields of `settings`.
    """

    name = ""
    title = ""
    # split -> names of its question file in the LLaVA form; the official files are `convert`'s to find
    splits: dict[str, tuple[str, ...]] = {}
    folder = ""  # its name under `eval/` in VisualRWKV's layout, where that is not the benchmark's
    folders: tuple[str, ...] = ("images", ".")  # where pictures are looked for under `data`, and under the root
    protocols: dict[str, str] = {}  # name of a way to judge -> what it does; the first is the default
    settings: dict[str, tuple] = {}  # what may change the questions -> allowed values; the first is the default
    note = ""  # what a reader of the score should know

    def __init__(self, data, split=None, questions=None, images=None, **settings):
        self.root = Path(data)
        inner = self.root / "eval" / (self.folder or self.name)
        self.data = inner if inner.is_dir() else self.root
        if not self.data.is_dir():
            raise InputError(f"{data}: no such folder; pass the folder that holds the files of {self.title}")
        if split is not None and split not in self.splits:
            raise InputError(f"split {split!r} is not one of {self.title}'s: {', '.join(self.splits)}")
        for name, value in settings.items():
            if value not in self.settings.get(name, ()):
                known = ", ".join(f"{key}: {values}" for key, values in self.settings.items()) or "none"
                raise InputError(f"{self.name} does not know the setting {name}={value}; it has {known}")
        self.stated = settings
        self.chosen = {name: values[0] for name, values in self.settings.items()} | settings
        self._questions = Path(questions) if questions else None
        self._images = Path(images) if images else None
        self.split = split or next((one for one in self.splits if self.has(one)), next(iter(self.splits)))
        self.source = None  # the file that the questions came from

    def has(self, split):
        """Whether the questions of a split are in the folder."""
        names = (*self.splits[split], *self.official(split)) if split in self.splits else ()
        return any((self.data / name).exists() for name in names)

    def official(self, split):
        """Names of the official file that holds the questions of a split."""
        return ()

    def questions(self) -> list[Question]:
        """All questions: of the LLaVA pack where it is there, else made from the official files."""
        packs = (self.data / name for name in self.splits[self.split])
        pack = self._questions or next((path for path in packs if path.exists()), None)
        if pack:
            self.source = pack
            with understood(pack, "a question file in the LLaVA form"):
                questions = self.numbered(self.from_pack(read_any(pack)))
            odd = next((q for q in questions if not isinstance(q.image, (str, type(None)))), None)
            if odd:
                raise InputError(f"{pack}: the picture of id {odd.id!r} is {odd.image!r}; it must be a file name")
            return questions
        return self.numbered(self.convert())

    def from_pack(self, records):
        """Questions of the records of a LLaVA question file; no other field of a record is looked at."""
        for record in records:
            names = [name for name in ("question_id", "id", "index") if name in record]
            yield Question(record[names[0]], record["text"], record["image"], record.get("category"))

    def convert(self):
        """Questions of the official files, in the words of the LLaVA pack."""
        raise NotImplementedError

    def numbered(self, questions):
        """Give questions with equal ids their numbers."""
        seen = Counter()
        result = []
        for question in questions:
            if not isinstance(question.id, (int, str)) or not isinstance(question.text, str) or not question.text:
                raise InputError(f"{self.source}: the question with id {question.id!r} has no text; repair the file")
            question.text = question.text.encode(errors="replace").decode()  # half a character cannot be written
            key = self.key(question.id)
            question.number = seen[key]
            seen[key] += 1
            result.append(question)
        if not result:
            raise InputError(f"{self.source or self.data}: there is no question of {self.title} in it")
        return result

    def key(self, id):
        """What two spellings of an id have in common."""
        return str(id)

    def picture(self, question):
        """Path (or bytes) of a question's picture."""
        roots = dict.fromkeys((self.data, self.root))
        folders = [self._images] if self._images else [root / folder for root in roots for folder in self.folders]
        found = next((path for folder in folders if (path := folder / question.image).is_file()), None)
        if found is None:
            places = ", ".join(str(folder / question.image) for folder in folders)
            raise InputError(f"no picture {question.image}; it belongs to {places}, or pass its folder with --images")
        return found

    def scored(self) -> list[Question]:
        """The questions that the score is about."""
        return self.numbered(self.convert())

    def exported(self) -> list[Question]:
        """The questions that the upload file is about."""
        return self.questions()

    def gold(self, questions) -> list:
        """What each question is judged by."""
        raise NotImplementedError

    def judge(self, questions, gold, answers, protocol, seed=0):
        """`scores.Scores` of answers; `answers` and `gold` in the order of `questions`, None for a missing answer."""
        raise NotImplementedError

    def export(self, questions, answers, out):
        """Write the upload file of the benchmark's server."""
        raise NotImplementedError

    def find(self, *names, origin):
        """Path of the first of these files that is there; otherwise the error says where it belongs."""
        for name in names:
            if (self.data / name).exists():
                return self.data / name
        others = f" (or {', '.join(names[1:])})" if names[1:] else ""
        raise InputError(f"{self.data / names[0]}: missing{others}; put the file there, it comes with {origin}")

    def read(self, *names, origin, what, hook=None):
        """(path, content) of a JSON file."""
        path = self.find(*names, origin=origin)
        with understood(path, what):
            return path, json.loads(path.read_bytes(), object_hook=hook)


def letters(options):
    """Options as lines "A. text"."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def read_any(path):
    """The records of a JSON array or of JSON lines."""
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    return read_lines(path)


def read_lines(path):
    """The objects of a JSON-lines file."""
    with understood(path, "a file of JSON lines"):
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)


def write_json(path, content, indent=None):
    """Write one JSON file."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")


def json_lines(records):
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_text(path, text):
    """Write a text file, and its folder if that is missing."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="replace"))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; choose another --out") from None


@contextmanager
def understood(path, what):
    """Turns what goes wrong while reading a file of the wrong kind into one line that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; pass {what}") from None
    except KeyError as error:
        raise InputError(f"{path}: not {what}: it lacks {error}; pass the right file") from None
    except (TypeError, AttributeError, IndexError, ValueError, RecursionError, csv.Error, OSError) as error:
        raise InputError(
            f"{path}: not {what}: {one_line(error, 200)}; download it again or pass the right file"
        ) from None
