"""`visualrwkv eval`: the answers of a model to a benchmark's questions, in a run that can be stopped at any moment.

A run is a folder: `run.json` holds the settings, `<n>_<k>.jsonl` the predictions of shard k of n, one flushed
line each. A started run reads all lines that are there, whatever shards wrote them, and does the rest.
"""

import contextlib
import json
import os
import sys
from hashlib import sha256
from pathlib import Path

from visualrwkv.errors import InputError
from visualrwkv.eval.answering import Answerer
from visualrwkv.eval.commands import ASKED, COMPARED, RUN_FILE, differing, open_benchmark, read_run
from visualrwkv.eval.predictions import join, shard_files


def evaluate(arguments):
    """Answer what is not yet answered of a benchmark, or of one shard of it."""
    for name in ("batch_size", "max_new_tokens", "workers"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; use a whole number from 1")
    shards, shard = which_shard(arguments.shard, os.environ)
    bench = open_benchmark(arguments)
    questions = bench.questions()
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}; choose another --out") from None
    own = chunk(len(questions), shards, shard)
    settings = describe(arguments, bench, questions)
    check_settings(out, settings, arguments.force)
    with exclusive(out / f"{shards}_{shard}.jsonl") as file:
        # also where all is answered: who runs the command for a changed model must not take its old answers for new
        vlm = load_model(arguments)
        settings |= describe_model(vlm, arguments.blank_image)
        check_settings(out, settings, arguments.force)
        answers = earlier(bench, questions, out)
        todo = [questions[index] for index in own if answers[index] is None]
        failed = []
        if todo:
            write_settings(out / RUN_FILE, settings)
            end_line(file)
            answerer = Answerer(
                vlm, bench, arguments.batch_size, arguments.max_new_tokens, arguments.workers, settings["blank_image"]
            )
            failed = write_answers(answerer, todo, len(own), file, settings["model"])
        else:
            print(f"{file.name}: all {len(own)} predictions are there", file=sys.stderr)
    wait_for_others()
    if failed:
        (first, reason), *_ = failed
        raise InputError(
            f"id {first.id!r}: {reason}; {len(failed)} of {len(own)} questions are unanswered, all other predictions "
            f"are in {out}; repair the pictures and run the same command again"
        )


def write_answers(answerer, todo, total, file, model_id):
    """Write a line for each answer; returns (question, reason) of those that could not be asked."""
    from tqdm import tqdm

    failed = []
    quiet = os.environ.get("RANK", "0") != "0"
    with tqdm(total=total, initial=total - len(todo), unit="question", file=sys.stderr, disable=quiet) as bar:
        for answer in answerer.answers(todo):
            question = answer.question
            image = question.image if isinstance(question.image, str) else None
            record = {"question_id": question.id}
            if answer.error is None:
                record |= {"prompt": answer.prompt, "text": answer.text, "model_id": model_id}
            else:
                record["error"] = answer.error
                failed.append((question, answer.error))
            record["metadata"] = {"image_file": image, "number": question.number}
            try:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()
            except OSError as error:
                raise InputError(
                    f"{file.name}: cannot be written: {error.strerror}; make room and run the same command again, "
                    "what is written is kept"
                ) from None
            bar.update()
    return failed


def wait_for_others():
    """torchrun ends all processes when one fails, so a process with unreadable pictures fails when all are done."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    from datetime import timedelta

    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    distributed.barrier()
    distributed.destroy_process_group()


def chunk(count, shards, shard):
    """Positions of one shard: the reference's blocks of ceil(count / shards), empty where it would crash."""
    size = -(-count // shards)
    return range(min(shard * size, count), min((shard + 1) * size, count))


def which_shard(text, environment):
    """(number of shards, which one) of `--shard k/n`, divided among the processes of torchrun."""
    shard, shards = 0, 1
    if text:
        first, slash, last = text.partition("/")
        if not (slash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise InputError(f"--shard {text!r}: use k/n with k from 0 to n - 1, for instance 0/4")
        shard, shards = int(first), int(last)
    rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(f"RANK is {rank!r} and WORLD_SIZE {world!r}; unset both, or set them as torchrun does")
    return shards * int(world), shard * int(world) + int(rank)


def earlier(bench, questions, out):
    """The answers that earlier runs wrote into the folder, None where there is none."""
    files = [path for path in shard_files(out) if path.stat().st_size]
    return join(bench, questions, files, nothing_is_fine=True).answers if files else [None] * len(questions)


@contextlib.contextmanager
def exclusive(path):
    """A file to append to that no other process writes."""
    try:
        file = open(path, "ab+")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; choose another --out") from None
    with file:
        with contextlib.suppress(ImportError):  # there is no fcntl on Windows
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path}: another run is writing it; wait for it, or use another --shard") from None
            except OSError:  # a file system without locks, as some of clusters are
                pass
        yield file


def end_line(file):
    """A line that a stopped run left half written must not run into the next one."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def load_model(arguments):
    """The model, on the device of this process."""
    from visualrwkv.loading import load

    return load(
        arguments.model,
        device=own_device(),
        prompt=arguments.prompt,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
    )


def own_device():
    """Auto, or under torchrun a CUDA device for each process of a machine."""
    import torch

    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return "auto"
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def describe(arguments, bench, questions):
    """What the predictions of a run depend on apart from the model's content, and where its files are."""
    digest = sha256()
    for question in questions:
        digest.update(json.dumps([question.id, question.text, question.image]).encode() + b"\n")
    model = str(arguments.model) if arguments.model else "embedded"
    return {
        "benchmark": bench.name,
        "split": bench.split,
        "model": model,
        "quantize": arguments.quantize,
        "max_new_tokens": arguments.max_new_tokens,
        **bench.chosen,
        "questions": len(questions),
        "questions_sha256": digest.hexdigest(),
        "data": str(bench.root.resolve()),
        "images": arguments.images and str(Path(arguments.images).resolve()),
        "question_file": arguments.questions and str(Path(arguments.questions).resolve()),
    }


def describe_model(vlm, blank_image):
    """The part of the settings that only the loaded model knows."""
    return {
        "fingerprint": vlm.fingerprint(),
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "prompt": vlm.processor.prompt,
        "blank_image": {"yes": True, "no": False, "auto": vlm.model.config.blank_image}[blank_image],
    }


def check_settings(out, settings, force):
    """Refuse to go on with a run of other questions, and of other settings unless they may be mixed."""
    path = out / RUN_FILE
    known = read_run(path)
    if not known and not force and any(file.stat().st_size for file in shard_files(out)):
        raise InputError(
            f"{path}: missing, so nothing tells how the predictions beside it were made; use another --out, or --force "
            "to go on with them"
        )
    # answers to other questions are of no use, whatever may be mixed
    name = differing(known, settings, ASKED if force else COMPARED) if known else None
    if name is not None:
        raise InputError(
            f"{path}: the run there has {name} {known.get(name)!r}, this one {settings[name]!r}; "
            f"use another --out{'' if name in ASKED else ', or --force to mix them'}"
        )


def write_settings(path, settings):
    """Several processes may start at once: each writes the same content, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror}; make room, or choose another --out") from None
