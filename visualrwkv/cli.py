"""The command line. Every command imports what it needs when it runs, so that --help and wrong calls answer at once.

Exit codes: 0, 2 for unusable input or a wrong call (one line on stderr), 130 after Ctrl-C, 141 when the reader of our
output has gone.
"""

import argparse
import atexit
import gc
import importlib
import json
import logging
import os
import sys
import warnings
from dataclasses import asdict

from visualrwkv import __version__
from visualrwkv.errors import InputError, error_line
from visualrwkv.prompt import POSITIONS


class _Parser(argparse.ArgumentParser):
    """Reports a wrong call on one line."""

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """As `parse_args`; unknown options are reported with the help of the command that was called."""
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = f"{parser.prog} {arguments.command}"
        more = "; a recipe is changed by KEY=VALUE, without dashes" if arguments.command == "train" else ""
        raise InputError(f"unrecognized arguments: {' '.join(unknown)} (see {command} --help{more})")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # An answer is wanted, not a log: transformers reads this when it is first imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Importing the libraries makes a million objects that stay. At Python's own pace, looking for garbage among them
    # takes a quarter of the time until a model is there, and as long again when the process ends.
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
    formatwarning = warnings.formatwarning
    try:
        _prepare_terminal()
        arguments = parse(build_parser(), sys.argv[1:] if argv is None else argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code or 0
    except InputError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more on exit, which would complain about the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail("out of memory; use a smaller model, picture count or batch, or a device with more memory")
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    finally:
        warnings.formatwarning = formatwarning


def _prepare_terminal():
    """Streams that take any character and may be closed; words on stderr without a programmer's lines."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"visualrwkv: warning: {message}\n"
    log = logging.getLogger("visualrwkv")  # of what takes long
    if not log.handlers:
        log.addHandler(_Log())
        log.setLevel(logging.INFO)


class _Log(logging.Handler):
    """Tells who waits why."""

    def emit(self, record):
        print(f"visualrwkv: {record.getMessage()}", file=sys.stderr, flush=True)


def _fail(error):
    print(error_line(error), file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of the parsed arguments is the function to call."""
    parser = _Parser(prog="visualrwkv", description="Questions about pictures, answered by a recurrent language model.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)

    ask = _command(commands, "ask", run_ask, "answer one question about a picture")
    ask.add_argument("image", metavar="IMAGE", help="picture file")
    ask.add_argument("question", metavar="QUESTION")
    _model_options(ask)
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of the bare answer")

    chat = _command(commands, "chat", run_chat, "a conversation in the terminal; /help there lists its commands")
    chat.add_argument("image", metavar="IMAGE", nargs="?", help="picture file, shown with the first question")
    _model_options(chat)
    chat.add_argument("--resume", metavar="FILE", help="continue a conversation written by /save")

    _demo(commands)
    _serving(commands)

    scenes = _command(commands, "scenes", run_scenes, "write drawn scenes with questions and answers")
    scenes.add_argument("out", metavar="OUT", help="folder to write")
    scenes.add_argument("--format", default="llava", choices=("llava", "vqav2", "scienceqa", "pope"))
    scenes.add_argument("--pictures", metavar="N", type=int, default=100, help="number of pictures (default 100)")
    scenes.add_argument("--seed", metavar="S", type=int, default=0, help="same seed, same scenes (default 0)")

    train = _command(commands, "train", run_train, "run a training stage")
    train.add_argument("config", metavar="CONFIG.yaml", help="recipe, for instance from configs/")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="fields of the recipe to change")

    inspect = _command(commands, "inspect", run_inspect, "what a training set holds, and which samples are unusable")
    inspect.add_argument("data", metavar="DATA.json", help="LLaVA-format file, JSON or JSON lines")
    inspect.add_argument("--images", metavar="DIR", help="folder that picture names start from (default: the file's)")
    inspect.add_argument("--max-length", metavar="N", type=int, default=2048, help="longest sample (default 2048)")
    inspect.add_argument("--model", metavar="M", help="whose tokens are counted (default: the embedded model)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    convert = _command(commands, "convert", run_convert, "turn a .pth checkpoint into a folder, or back")
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("target", metavar="DST")

    _evaluation(commands)

    info = _command(commands, "info", run_info, "versions and devices; sizes and costs of a model")
    info.add_argument("model", metavar="MODEL", nargs="?", help="folder, .pth file or Hub name")
    return parser


def _demo(commands):
    """The command of visualrwkv.demo."""
    demo = _command(commands, "demo", run_demo, "a chat about pictures in the browser")
    demo.add_argument("--model", metavar="M", action="append", default=[], dest="models",
                      help="folder, .pth file or Hub name to offer beside the embedded model; may be repeated, the "
                      "first one is picked at the start (`embedded` is a name, too)")  # fmt: skip
    demo.add_argument("--host", metavar="H", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    demo.add_argument("--port", metavar="P", type=int, help="port (default: the first free one from 7860)")
    demo.add_argument("--share", action="store_true", help="a public address through Gradio's tunnel")
    demo.add_argument("--auth", metavar="USER:PASSWORD", action="append", default=[], help="ask for a login")
    demo.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda or cuda:N")
    _precision(demo)
    demo.add_argument("--sessions", metavar="N", type=int, default=64, help="most conversations kept (default 64)")
    demo.add_argument("--idle", metavar="MIN", type=float, default=30, help="minutes one may be unused (default 30)")
    demo.add_argument("--concurrency", metavar="N", type=int, default=2, help="replies written at once (default 2)")
    demo.add_argument("--queue", metavar="N", type=int, default=32, help="most requests that wait (default 32)")
    demo.add_argument("--max-upload", metavar="MIB", type=int, default=40, help="largest file taken (default 40 MiB)")


def _serving(commands):
    """The command of visualrwkv.serving."""
    serve = _command(commands, "serve", run_serve, "an OpenAI-style HTTP endpoint; Ctrl-C ends it")
    _which_model(serve)
    serve.add_argument("--host", metavar="H", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", metavar="P", type=int, default=8000, help="0 for any free one (default 8000)")
    serve.add_argument("--slots", metavar="N", type=int, default=32, help="replies under way together (default 32)")
    serve.add_argument("--queue", metavar="N", type=int, default=64, help="requests that may wait (default 64)")
    serve.add_argument("--max-tokens", metavar="N", type=int, default=1024, help="longest reply (default 1024)")
    serve.add_argument("--max-prompt-tokens", metavar="N", type=int, default=8192, help="longest prompt (default 8192)")
    serve.add_argument("--max-body-mb", metavar="N", type=int, default=20, help="largest request, MiB (default 20)")
    serve.add_argument("--api-key", metavar="KEY", help="clients must send it (default: $VISUALRWKV_API_KEY, or none)")
    serve.add_argument("--allow-remote-images", action="store_true", help="fetch pictures from public web addresses")


def _evaluation(commands):
    """The commands of visualrwkv.eval."""
    evaluate = _command(commands, "eval", run_eval, "answer the questions of a benchmark, going on where a run stopped")
    _benchmark_options(evaluate)
    evaluate.add_argument("--out", metavar="DIR", required=True, help="folder of the run")
    _which_model(evaluate)
    evaluate.add_argument("--images", metavar="DIR", help="picture folder, if it is not under --data")
    evaluate.add_argument("--shard", metavar="k/n", help="only part k of n, counted from 0")
    evaluate.add_argument("--batch-size", metavar="B", type=int, default=1, help="questions at a time (default 1)")
    evaluate.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="longest answer (default 128)")
    evaluate.add_argument("--workers", metavar="W", type=int, default=2, help="threads that read pictures (default 2)")
    evaluate.add_argument("--blank-image", choices=("auto", "yes", "no"), default="auto",
                          help="show questions without a picture an empty one (auto: .pth checkpoints)")  # fmt: skip
    evaluate.add_argument("--force", action="store_true", help="go on although the settings of the run differ")

    score = _command(commands, "score", run_score, "score predictions, without a model")
    export = _command(commands, "export", run_export, "write the upload file of a benchmark's server")
    for parser in (score, export):
        _benchmark_options(parser)
        parser.add_argument("--predictions", metavar="FILES", nargs="+", required=True, help="files or run folders")
        parser.add_argument("--require-complete", action="store_true", help="a missing prediction is an error")
    score.add_argument("--protocol", metavar="P", help="another way to judge; a wrong name lists them")
    score.add_argument("--seed", metavar="S", type=int, default=0, help="of the interval (default 0)")
    score.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    export.add_argument("--out", metavar="FILE", required=True, help="file to write (pope, mme: folder)")
    export.add_argument("--fill-missing", action="store_true", help="vizwiz: write unanswerable for missing answers")

    report = _command(commands, "report", run_report, "compare runs on one HTML page")
    report.add_argument("runs", metavar="RUN", nargs="+", help="folders that `visualrwkv eval` wrote")
    report.add_argument("--out", metavar="FILE", default="report.html", help="page to write (default report.html)")
    report.add_argument("--data", metavar="DIR", help="folder of the benchmark's files, if it has moved since the run")


def _benchmark_options(parser):
    parser.add_argument("benchmark", metavar="BENCHMARK", help="vqav2, scienceqa, ...; a wrong name lists them")
    parser.add_argument("--data", metavar="DIR", required=True, help="official files, or the LLaVA pack")
    parser.add_argument("--split", metavar="S", help="by default the first whose questions are there")
    parser.add_argument("--questions", metavar="FILE", help="question file in the LLaVA form")
    parser.add_argument("--sqa-suffix", choices=("none", "option"), help="scienceqa: ask for the letter (default none)")
    parser.add_argument("--ocr", action=argparse.BooleanOptionalAction, help="textvqa: OCR words (default yes)")


def _command(commands, name, run, text):
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _which_model(parser):
    parser.add_argument("--model", metavar="M", help="folder, .pth file, owner/repo or owner/repo:file.pth")
    parser.add_argument("--prompt", choices=POSITIONS, help="where the picture stands")
    _precision(parser)


def _precision(parser):
    known = "float32, bfloat16, float16; default: as saved, on a CPU float32 for float16"
    parser.add_argument("--dtype", metavar="D", default="auto", help=known)
    parser.add_argument("--quantize", choices=("int8",), help="weights of eight bits in the language model")


def _model_options(parser):
    _which_model(parser)
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="longest answer (default 128)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 (default): the likeliest token")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="probability to sample among")
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="tokens to sample among; 0 (default): all")
    parser.add_argument("--seed", metavar="S", type=int, help="same seed, same answer when sampling")
    parser.add_argument("--presence-penalty", metavar="X", type=float, default=0.0, help="against repetition (0: none)")
    parser.add_argument("--frequency-penalty", metavar="X", type=float, default=0.0, help="the same, for each time")
    parser.add_argument("--penalty-decay", metavar="X", type=float, default=0.996, help="how it fades (default 0.996)")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends the answer; may be repeated")


def _sampling(arguments):
    """Fields of `Sampling`; options that were left alone stay away from the record of `ask --json`, but for three."""
    from visualrwkv.sampling import Sampling

    given = asdict(Sampling(**{name: getattr(arguments, name) for name in Sampling.__dataclass_fields__}))
    defaults = asdict(Sampling())
    always = ("max_new_tokens", "temperature", "top_p")
    return {name: value for name, value in given.items() if name in always or value != defaults[name]}


def _load(arguments):
    from visualrwkv.loading import load

    return load(arguments.model, prompt=arguments.prompt, dtype=arguments.dtype, quantize=arguments.quantize)


def run_ask(arguments):
    """`visualrwkv ask`"""
    from visualrwkv.image_processing import load_image
    from visualrwkv.prompt import check_question

    # what the user typed is looked at before the model is loaded
    check_question(arguments.question)
    image, sampling = load_image(arguments.image), _sampling(arguments)
    answer = _load(arguments).ask(image, arguments.question, **sampling)
    if arguments.json:
        record = {"image": arguments.image, "question": arguments.question, "answer": answer, "model": arguments.model}
        answer = json.dumps(record | sampling, ensure_ascii=False)
    print(answer)


def run_chat(arguments):
    """`visualrwkv chat`"""
    from visualrwkv import terminal
    from visualrwkv.image_processing import load_image

    pictures, sampling = [load_image(arguments.image)] if arguments.image else [], _sampling(arguments)
    vlm = _load(arguments)
    session = vlm.chat.load(arguments.resume) if arguments.resume else vlm.chat()
    return terminal.talk(session, pictures, sampling)


def run_serve(arguments):
    """`visualrwkv serve`"""
    for name, least in (("slots", 1), ("queue", 0), ("max_tokens", 1), ("max_prompt_tokens", 1), ("max_body_mb", 1)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {getattr(arguments, name)}; use a whole number from {least}")
    from visualrwkv.addresses import is_local
    from visualrwkv.paths import without_folders
    from visualrwkv.serving import app

    key = os.environ.get("VISUALRWKV_API_KEY") or None if arguments.api_key is None else arguments.api_key
    if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
        raise InputError(f"--api-key is {key!r}; use printable ASCII characters, or leave it out to let everybody in")
    limits = app.Limits(
        body_bytes=arguments.max_body_mb * 2**20,
        max_tokens=arguments.max_tokens,
        prompt_tokens=arguments.max_prompt_tokens,
        remote_images=arguments.allow_remote_images,
    )
    name = "visualrwkv-tiny" if arguments.model is None else without_folders(arguments.model)
    settings = app.Settings(name, arguments.slots, arguments.queue, key, limits)
    with app.listen(arguments.host, arguments.port) as listener:
        if key is None and not is_local(arguments.host):
            print("Whoever reaches this address can use it; --api-key KEY asks for a key.", file=sys.stderr)
        app.serve(_load(arguments), settings, listener)


def run_demo(arguments):
    """`visualrwkv demo`"""
    numbers = ("sessions", "idle", "concurrency", "queue", "max_upload")
    for name in numbers:
        if not getattr(arguments, name) > 0:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {getattr(arguments, name)}; use a number above 0")
    if arguments.port is not None and not 0 < arguments.port < 65536:
        raise InputError(f"--port is {arguments.port}; use a number from 1 to 65535")
    logins = [tuple(login.split(":", 1)) for login in arguments.auth]
    for login in logins:
        if len(login) != 2 or not all(login):
            raise InputError("--auth needs USER:PASSWORD, for instance --auth anna:secret")
    names = ("models", "host", "port", "share", "device", "dtype", "quantize", *numbers)
    options = {name: getattr(arguments, name) for name in names}
    importlib.import_module("visualrwkv.demo.app").run(auth=logins, **options)


def run_scenes(arguments):
    """`visualrwkv scenes`"""
    from visualrwkv.scenes.writers import write_scenes

    write_scenes(arguments.out, format=arguments.format, pictures=arguments.pictures, seed=arguments.seed)


def run_train(arguments):
    """`visualrwkv train`"""
    from visualrwkv import training

    return training.run(arguments.config, arguments.overrides)


def run_inspect(arguments):
    """`visualrwkv inspect`"""
    from visualrwkv.inspection import inspect, pictures_elsewhere, table
    from visualrwkv.loading import load

    if arguments.max_length < 1:
        raise InputError(f"--max-length is {arguments.max_length}; use a whole number from 1")
    processor = load(arguments.model, device="cpu").processor
    result = inspect(arguments.data, arguments.images, processor, arguments.max_length)
    print(json.dumps(result, ensure_ascii=False) if arguments.json else table(result))
    if not result["usable"]:
        raise InputError(
            f"{arguments.data}: no sample can be used{pictures_elsewhere(arguments.data, arguments.images)}"
        )


def run_convert(arguments):
    """`visualrwkv convert`"""
    from visualrwkv import checkpoints

    for path in checkpoints.convert(arguments.source, arguments.target):
        print(path)


def run_eval(arguments):
    """`visualrwkv eval`"""
    return _eval_module("run").evaluate(arguments)


def run_score(arguments):
    """`visualrwkv score`"""
    return _eval_module("commands").score(arguments)


def run_export(arguments):
    """`visualrwkv export`"""
    return _eval_module("commands").export(arguments)


def run_report(arguments):
    """`visualrwkv report`"""
    return _eval_module("report").write(arguments)


def _eval_module(name):
    return importlib.import_module(f"visualrwkv.eval.{name}")


def run_info(arguments):
    """`visualrwkv info`"""
    from visualrwkv.info import report
    from visualrwkv.loading import load

    print(report(load(arguments.model).model if arguments.model else None))


if __name__ == "__main__":
    sys.exit(main())
