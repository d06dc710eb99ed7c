"""The command line. Every command imports what it needs when it runs, so that --help and wrong calls answer at once.

Exit codes: 0, 2 for unusable input or a wrong call (one line on stderr), 130 after Ctrl-C, 141 when the reader of our
output has gone.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys

from visualrwkv import __version__
from visualrwkv.errors import InputError
from visualrwkv.prompt import POSITIONS

CHAT_HELP = "/image PATH shows a picture with the next question; /save FILE; /reset; /quit"


class _Parser(argparse.ArgumentParser):
    """Reports a wrong call on one line."""

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # An answer is wanted, not a log: transformers reads this when it is first imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        arguments = build_parser().parse_args(argv)
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


def _fail(error):
    print("visualrwkv: error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of the parsed arguments is the function to call."""
    parser = _Parser(prog="visualrwkv", description="Questions about pictures, answered by a recurrent language model.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    ask = _command(commands, "ask", run_ask, "answer one question about a picture")
    ask.add_argument("image", metavar="IMAGE", help="picture file")
    ask.add_argument("question", metavar="QUESTION")
    _model_options(ask)
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of the bare answer")

    chat = _command(commands, "chat", run_chat, f"a conversation in the terminal: {CHAT_HELP}")
    chat.add_argument("image", metavar="IMAGE", nargs="?", help="picture file, shown with the first question")
    _model_options(chat)
    chat.add_argument("--resume", metavar="FILE", help="continue a conversation written by /save")

    _demo(commands)

    scenes = _command(commands, "scenes", run_scenes, "write drawn scenes with questions and answers")
    scenes.add_argument("out", metavar="OUT", help="folder to write")
    scenes.add_argument("--format", default="llava", choices=("llava", "vqav2", "scienceqa", "pope"))
    scenes.add_argument("--pictures", metavar="N", type=int, default=100, help="number of pictures (default 100)")
    scenes.add_argument("--seed", metavar="S", type=int, default=0, help="same seed, same scenes (default 0)")

    train = _command(commands, "train", run_train, "run a training stage")
    train.add_argument("config", metavar="CONFIG.yaml", help="recipe, for instance from configs/")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="fields of the recipe to change")

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
    demo.add_argument("--sessions", metavar="N", type=int, default=64, help="most conversations kept (default 64)")
    demo.add_argument("--idle", metavar="MIN", type=float, default=30, help="minutes until it goes unused (default 30)")
    demo.add_argument("--concurrency", metavar="N", type=int, default=2, help="replies written at once (default 2)")
    demo.add_argument("--queue", metavar="N", type=int, default=32, help="most requests that wait (default 32)")
    demo.add_argument("--max-upload", metavar="MIB", type=int, default=40, help="largest file taken (default 40 MiB)")


def _evaluation(commands):
    """The commands of visualrwkv.eval."""
    evaluate = _command(commands, "eval", run_eval, "answer the questions of a benchmark, going on where a run stopped")
    _benchmark_options(evaluate)
    evaluate.add_argument("--out", metavar="DIR", required=True, help="folder of the run")
    evaluate.add_argument("--model", metavar="M", help="folder, .pth file, owner/repo or owner/repo:file.pth")
    evaluate.add_argument("--prompt", choices=POSITIONS, help="where the picture stands")
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


def _model_options(parser):
    parser.add_argument("--model", metavar="M", help="folder, .pth file, owner/repo or owner/repo:file.pth")
    parser.add_argument("--prompt", choices=POSITIONS, help="where the picture stands")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="longest answer (default 128)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 (default): the likeliest token")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="probability to sample among")


def _sampling(arguments):
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p")}


def _load(arguments):
    from visualrwkv.loading import load

    return load(arguments.model, prompt=arguments.prompt)


def run_ask(arguments):
    """`visualrwkv ask`"""
    from visualrwkv.image_processing import load_image
    from visualrwkv.prompt import check_question

    # what the user typed is looked at before the model is loaded
    check_question(arguments.question)
    image = load_image(arguments.image)
    answer = _load(arguments).ask(image, arguments.question, **_sampling(arguments))
    if arguments.json:
        record = {"image": arguments.image, "question": arguments.question, "answer": answer, "model": arguments.model}
        answer = json.dumps(record | _sampling(arguments), ensure_ascii=False)
    print(answer)


def run_chat(arguments):
    """`visualrwkv chat`: one line is one turn; replies go to stdout as they are written, all else to stderr."""
    from visualrwkv.image_processing import load_image

    pictures = [load_image(arguments.image)] if arguments.image else []
    vlm = _load(arguments)
    session = vlm.chat.load(arguments.resume) if arguments.resume else vlm.chat()
    terminal = sys.stdin.isatty()
    failed = False
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing in input()
        print(CHAT_HELP, file=sys.stderr)
    while (line := _next_line(terminal)) is not None:
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        try:
            if not command:
                continue
            if command == "/quit":
                break
            elif command == "/reset":
                session.reset()
                pictures = []
            elif command == "/image":
                pictures.append(load_image(rest))
            elif command == "/save":
                _save(session, rest)
            elif command.startswith("/"):
                raise InputError(f"{command} is not a command; {CHAT_HELP}")
            else:
                for piece in session.stream(line.strip(), pictures, **_sampling(arguments)):
                    print(piece, end="", flush=True)
                print(flush=True)
                pictures = []
        except InputError as error:  # one bad line does not end a conversation
            failed = True
            _fail(error)
    return 2 if failed and not terminal else 0


def _next_line(terminal):
    """The next line of input, None at its end."""
    if not terminal:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _save(session, path):
    if not path:
        raise InputError("/save needs the name of a file to write")
    try:
        session.save(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


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
    options = {name: getattr(arguments, name) for name in ("models", "host", "port", "share", "device", *numbers)}
    importlib.import_module("visualrwkv.demo.app").run(auth=logins, **options)


def run_scenes(arguments):
    """`visualrwkv scenes`"""
    from visualrwkv.scenes.writers import write_scenes

    write_scenes(arguments.out, format=arguments.format, pictures=arguments.pictures, seed=arguments.seed)


def run_train(arguments):
    """`visualrwkv train`"""
    from visualrwkv import training

    return training.run(arguments.config, arguments.overrides)


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
