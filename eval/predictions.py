"""Prediction files: reading lines that a stopped run may have cut, and joining them to questions by key.

A record is `{"question_id": ..., "prompt": ..., "text": ..., "model_id": ..., "metadata": {...}}`, one a line. The last
complete line of a key counts. Files of other tools in the LLaVA form are read alike.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from visualrwkv.errors import InputError
from visualrwkv.prompt import MARKER


def read_records(path):
    """(line number, id, record) of every complete record of a file; cut lines and lines without a text are left out."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and isinstance(record.get("text"), str):
                    id = record_id(record)
                    if id is not None:
                        yield number, id, record
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; pass the file that the run wrote") from None


def record_id(record):
    """The id of a record, whatever it is called; None without one."""
    for name in ("question_id", "id", "index"):
        if record.get(name) is not None:
            return record[name]
    return None


def shard_files(folder):
    """The predictions of a run folder: `<n>_<k>.jsonl`, which `visualrwkv eval` wrote for shard k of n, behind
    `merge.jsonl`, into which VisualRWKV's scripts join them."""
    files = {path: re.fullmatch(r"(\d+)_(\d+)\.jsonl", path.name) for path in sorted(folder.glob("*.jsonl"))}
    shards = sorted((int(name[1]), int(name[2]), path) for path, name in files.items() if name)
    return [*filter(lambda path: path.name == "merge.jsonl", files), *(path for *_, path in shards)]


def prediction_files(paths):
    """The files meant by names of files and of folders: those of a run, else all JSON lines in it."""
    files = []
    for path in map(Path, paths):
        found = shard_files(path) or sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: the folder holds no .jsonl file; pass the folder that `visualrwkv eval` wrote")
        files += found
    return files


@dataclass
class Predictions:
    """Predictions joined to a list of questions.

    Args:
        answers: text of each question's prediction, None where there is none.
        unknown: how many records belong to no question.
        first_unknown: where the first of them stands.
    """

    answers: list[str | None]
    unknown: int = 0
    first_unknown: str = ""
    missing: list = field(default_factory=list)


def join(bench, questions, paths, nothing_is_fine=False):
    """Find the prediction of every question.

    Where an id occurs more than once (TextVQA, MME) a record belongs to the question whose words its prompt holds.
    Without a prompt, or where two ask the same, its number tells, or else the order of the records.

    Args:
        bench: the benchmark.
        questions: its questions.
        paths: files and run folders.
        nothing_is_fine: accept files of which no record fits.

    Raises:
        InputError: no record fits the questions, a record's prompt asks something else, or it holds no reply.
    """
    slots: dict[str, list[int]] = {}
    for position, question in enumerate(questions):
        slots.setdefault(bench.key(question.id), []).append(position)
    result = Predictions([None] * len(questions))
    untold: Counter = Counter()  # records that may belong to several questions, by the places of these
    for path in prediction_files(paths):
        for number, id, record in read_records(path):
            key = bench.key(id)
            places = slots.get(key)
            if not places:
                result.unknown += 1
                result.first_unknown = result.first_unknown or f"{path}, line {number}: id {id!r}"
                continue
            fitting = [place for place in places if asks(record, questions[place])]
            if not fitting:
                raise InputError(
                    f"{path}, line {number}: id {id!r} answers another question than "
                    f"{bench.title} asks under this id ({first_line(questions[places[0]])!r}); pass the predictions of "
                    f"{bench.name}, split {bench.split}"
                )
            if len(places) > 1:
                fitting = _likeliest(record, {at: questions[at] for at in fitting})
            place = fitting[0]
            if len(fitting) > 1:
                place = fitting[untold[tuple(fitting)] % len(fitting)]
                untold[tuple(fitting)] += 1
            if not record.get("prompt") and record["text"] == questions[place].text:
                raise InputError(
                    f"{path}, line {number}: id {id!r} has the question as its text; pass predictions, not the "
                    "question file"
                )
            result.answers[place] = record["text"]
    if not nothing_is_fine and all(answer is None for answer in result.answers):
        where = result.first_unknown or ", ".join(map(str, paths))
        raise InputError(
            f"{where}: no prediction fits a question of {bench.title}, split {bench.split} "
            f"(first id there: {questions[0].id!r}); pass the predictions of this benchmark and split"
        )
    result.missing = [question.id for question, answer in zip(questions, result.answers, strict=True) if answer is None]
    return result


def _likeliest(record, candidates):
    """Positions of the questions that a record with a repeated id may answer.

    The candidates are the questions that its prompt may hold. Numbers count in the order of one question file, so of
    another one the words tell, and of a question that is a part of another one the longer.
    """
    metadata = record.get("metadata")
    number = metadata.get("number") if isinstance(metadata, dict) else None
    if record.get("prompt"):
        longest = max(len(first_line(question)) for question in candidates.values())
        candidates = {at: question for at, question in candidates.items() if len(first_line(question)) == longest}
    return [at for at, question in candidates.items() if question.number == number] or list(candidates)


def first_line(question):
    """The first line of a question's words."""
    return question.text.replace(MARKER, "").lstrip().partition("\n")[0]


def asks(record, question):
    """Whether a record's prompt holds the question; a record without a prompt might."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        return True
    line = first_line(question)
    return line in prompt or _plain(line) in _plain(prompt)


def _plain(text):
    return " ".join(text.casefold().split())
