"""The command line, mostly in this process (loading torch for each call would take minutes), some in their own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import visualrwkv
from visualrwkv import cli, terminal

SHORT = ["--max-new-tokens", "8"]


@pytest.fixture
def run(capsys):
    """Run a command; returns exit code, stdout, stderr."""

    def run_command(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("visualrwkv: error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err


def test_ask_prints_the_answer_and_nothing_else(run, vlm, picture_file, random_folder):
    answer = vlm.ask(picture_file, "What?", max_new_tokens=8)
    code, out, err = run("ask", picture_file, "What?", "--model", random_folder, *SHORT)
    assert (code, out, err) == (0, answer + "\n", "")


def test_ask_as_json(run, vlm, picture_file, random_folder):
    code, out, _ = run("ask", picture_file, "What?", "--model", random_folder, "--json", "--prompt", "first", *SHORT)
    record = json.loads(out)
    assert code == 0
    assert record["question"] == "What?" and record["image"] == str(picture_file)
    assert record["max_new_tokens"] == 8
    assert isinstance(record["answer"], str)


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"dtype": "bfloat16", "quantize": "int8"}]
)
def test_ask_in_another_precision(run, picture_file, random_folder, options):
    answer = visualrwkv.load(random_folder, **options).ask(picture_file, "What?", max_new_tokens=8)
    written = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert run("ask", picture_file, "What?", "--model", random_folder, *SHORT, *written) == (0, answer + "\n", "")
    refused(run("ask", picture_file, "What?", "--model", random_folder, "--dtype", "half"), "'half'", "bfloat16")


def test_bad_pictures_and_questions(run, picture_file, huge_png, random_folder, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture_file.read_bytes()[:1000])
    huge = tmp_path / "huge.png"
    huge.write_bytes(huge_png)
    model = ["--model", random_folder]
    for file in (text, cut, huge, tmp_path / "absent.png", tmp_path):
        refused(run("ask", file, "What?", *model), str(file))
    refused(run("ask", picture_file, "", *model), "question is empty")
    refused(run("ask", picture_file, "Is <image> red?", *model), "<image>")
    refused(run("ask", picture_file, "What?", *model, "--max-new-tokens", "0"), "max_new_tokens is 0")
    refused(run("ask", picture_file, "What?", *model, "--temperature", "nan"), "temperature is nan")


def test_bad_models(run, picture_file, random_folder, tmp_path):
    refused(run("ask", picture_file, "What?", "--model", tmp_path), str(tmp_path), "no config.json")
    folder = shutil.copytree(random_folder, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    del tensors["rwkv.blocks.1.att.key.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(run("ask", picture_file, "What?", "--model", folder), str(folder), "rwkv.blocks.1.att.key.weight")
    pickled = tmp_path / "weights.pth"
    torch.save({"emb.weight": torch.zeros(2, 2)}, pickled)
    refused(run("ask", picture_file, "What?", "--model", pickled), str(pickled))


def test_an_unknown_model_name_without_network(picture_file, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "visualrwkv.cli", "ask", picture_file, "What?", "--model", "no/such-model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    refused((done.returncode, done.stdout, done.stderr), "no/such-model", "HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    "call",
    [
        [],
        ["paint"],
        ["ask"],
        ["ask", "picture.png"],
        ["ask", "picture.png", "What?", "--prompt", "below"],
        ["ask", "picture.png", "What?", "--max-new-tokens", "many"],
        ["scenes", "out", "--format", "coco"],
        ["convert", "one"],
        ["ask", "picture.png", "What?", "--temprature", "1"],
    ],
)
def test_wrong_calls(run, call):
    refused(run(*call), "--help")


def test_an_unknown_option_leads_to_the_help_of_its_command(run):
    refused(run("ask", "a.png", "What?", "--temprature", "1"), "unrecognized arguments: --temprature 1", "ask --help")
    refused(run("train", "x.yaml", "--warmup", "0"), "train --help; a recipe is changed by KEY=VALUE, without dashes")


def test_help_and_version_answer_without_torch():
    script = """
import sys
import visualrwkv
from visualrwkv import cli
try:
    cli.main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
"""
    for call in (["--help"], ["ask", "--help"], ["chat", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", script, *call], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_commands_are_those_that_exist():
    """A verb is listed once it works."""
    actions = [action for action in cli.build_parser()._actions if action.choices]
    verbs = ["ask", "chat", "demo", "serve", "scenes", "train", "inspect", "convert"]
    verbs += ["eval", "score", "export", "report", "info"]
    assert list(actions[0].choices) == verbs


@pytest.fixture
def talk(run, monkeypatch):
    """Run `visualrwkv chat` with lines on its standard input."""

    def run_chat(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        return run("chat", *arguments, *SHORT)

    return run_chat


def test_chat_answers_line_by_line(talk, vlm, random_folder, picture_file, pictures, tmp_path):
    second = tmp_path / "second.png"
    pictures[1].save(second)
    chat = vlm.chat()
    expected = [chat.say("What?", pictures[0], max_new_tokens=8), chat.say("And here?", pictures[1], max_new_tokens=8)]
    lines = ["What?", "", f"/image {second}", "And here?", "/quit", "never read"]
    code, out, err = talk(lines, picture_file, "--model", random_folder)
    assert (code, out, err) == (0, "".join(answer + "\n" for answer in expected), "")


def test_chat_saves_resumes_and_resets(talk, vlm, random_folder, picture_file, tmp_path):
    file = tmp_path / "talk.safetensors"
    model = ["--model", random_folder]
    assert talk(["What?", f"/save {file}"], picture_file, *model)[0] == 0
    chat = vlm.chat()
    chat.say("What?", picture_file, max_new_tokens=8)
    expected = chat.say("Why?", max_new_tokens=8) + "\n" + vlm.chat().say("Why?", max_new_tokens=8) + "\n"
    assert talk(["Why?", "/reset", "Why?"], "--resume", file, *model) == (0, expected, "")


def test_chat_takes_back_looks_again_and_helps(talk, vlm, random_folder, picture_file):
    chat = vlm.chat()
    first = chat.say("What?", picture_file, max_new_tokens=8)
    again = chat.say("Why?", max_new_tokens=8)
    chat.undo()
    looked = chat.say("And now?", look_again=True, max_new_tokens=8)
    lines = ["/help", "What?", "Why?", "/undo", "/look And now?"]
    code, out, err = talk(lines, picture_file, "--model", random_folder)
    assert (code, out) == (0, f"{first}\n{again}\n{looked}\n")
    assert "/image PATH" in err and "taken back: Why?" in err
    code, out, err = talk(["Why?", "/undo", "What?"], picture_file, "--model", random_folder)
    assert out.splitlines()[-1] == first  # the picture of the question that was taken back is shown again
    refused(talk(["/undo"], "--model", random_folder), "no turn to take back")
    refused(talk(["/look What?"], "--model", random_folder), "no picture")


def test_chat_passes_sampling_options(talk, vlm, random_folder):
    options = ["--temperature", "1", "--seed", "3", "--top-k", "5", "--frequency-penalty", "1", "--stop", "e"]
    sampling = {"temperature": 1.0, "seed": 3, "top_k": 5, "frequency_penalty": 1.0, "stop": ["e"], "max_new_tokens": 8}
    expected = vlm.chat().say("What?", **sampling)
    assert talk(["What?"], "--model", random_folder, *options) == (0, expected + "\n", "")
    refused(talk(["What?"], "--model", random_folder, "--seed", "-1"), "seed")


def at_a_terminal(monkeypatch, *lines):
    """Let a person type lines, or press Ctrl-C, and then Ctrl-D."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    typed = iter(lines)

    def ask(prompt):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)


def test_ctrl_c_stops_a_reply_and_keeps_the_conversation(monkeypatch, capfd, vlm):
    """What a terminal does, with a reply that is interrupted after its second piece."""
    at_a_terminal(monkeypatch, "What?", KeyboardInterrupt(), "Why?")
    session, pieces = vlm.chat(), []

    def interrupted(text, *arguments, **options):
        original = type(session).stream(session, text, *arguments, **options)
        for count, piece in enumerate(original, 1):
            pieces.append(piece)
            yield piece
            if text == "What?" and count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(session, "stream", interrupted)
    assert terminal.talk(session, [], {"max_new_tokens": 400, "temperature": 1.0, "seed": 0}) == 0
    out, err = capfd.readouterr()
    assert "[stopped]" in err and "/quit ends" in err
    said = [turn["text"] for turn in session.transcript]
    assert said[::2] == ["What?", "Why?"] and out.splitlines()[0].startswith("".join(pieces[:2]))


def test_ctrl_c_before_the_first_word_leaves_the_picture_waiting(monkeypatch, capfd, vlm, pictures):
    at_a_terminal(monkeypatch, "What?", "What now?")
    calls, forward = [], vlm.model.forward

    def interrupted(**inputs):
        calls.append(inputs)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return forward(**inputs)

    monkeypatch.setattr(vlm.model, "forward", interrupted)
    session = vlm.chat()
    assert terminal.talk(session, [pictures[0]], {"max_new_tokens": 8}) == 0
    assert "[stopped]" in capfd.readouterr().err
    assert [(turn["text"], turn["images"]) for turn in session.transcript[::2]] == [("What now?", 1)]


def test_ctrl_c_while_a_picture_is_opened_does_not_end_the_chat(monkeypatch, capfd, vlm, picture_file):
    at_a_terminal(monkeypatch, "What?", f"/image {picture_file}", "Why?")

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "load_image", interrupted)
    session = vlm.chat()
    assert terminal.talk(session, [], {"max_new_tokens": 8}) == 0
    out, err = capfd.readouterr()
    assert "/quit ends" in err and [turn["text"] for turn in session.transcript[::2]] == ["What?", "Why?"]
    assert "> " not in out and err.count("> ") >= 1  # the prompt is not among the replies


def test_paths_as_people_type_them(talk, vlm, random_folder, picture_file, tmp_path, monkeypatch):
    odd = tmp_path / "my picture.png"
    odd.write_bytes(picture_file.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    escaped = str(odd).replace(" ", "\\ ")
    lines = [
        f"/image {odd}",
        f'/image "{odd}"',
        f"/image '{odd}'",
        f"/image {escaped}",
        "/image ~/my picture.png",
        "What?",
    ]
    code, out, err = talk([*lines, f"/save '{tmp_path}/a talk'"], "--model", random_folder)
    assert (code, err) == (0, "") and out == vlm.chat().say("What?", [odd] * 5, max_new_tokens=8) + "\n"
    assert (tmp_path / "a talk").is_file()


def test_a_key_that_keeps_nobody_out_is_refused(run):
    for key in ("", " ", "schlüssel"):
        refused(run("serve", "--port", "0", "--api-key", key), "--api-key is")
    refused(run("serve", "--port", "0", "--host", "a..b"), "a..b, port 0: cannot be listened on")


def test_a_bad_line_does_not_end_a_chat(talk, vlm, random_folder, tmp_path):
    bad = [
        "/image nowhere.png",
        "/save",
        f"/save {tmp_path}/no/folder",
        "/dance",
        "What is <image>?",
        "/save ~no-such-user/x",
    ]
    code, out, err = talk([*bad, "What?"], "--model", random_folder)
    assert code == 2 and out == vlm.chat().say("What?", max_new_tokens=8) + "\n"
    assert err.count("visualrwkv: error: ") == len(bad) == err.count("\n")


def test_chat_refuses_a_file_that_is_no_conversation(talk, random_folder, picture_file):
    refused(talk(["What?"], "--model", random_folder, "--resume", picture_file), str(picture_file))


def test_scenes(run, tmp_path):
    code, out, _ = run("scenes", tmp_path / "new", "--pictures", 3, "--seed", 5, "--format", "pope")
    assert (code, out) == (0, "") and any((tmp_path / "new").rglob("*.*"))
    refused(run("scenes", tmp_path / "none", "--pictures", 0), "0 pictures")


def test_convert_and_train_refuse_what_is_not_there(run, tmp_path):
    refused(run("convert", tmp_path / "absent.pth", tmp_path / "new"), "absent.pth")
    refused(run("train", tmp_path / "absent.yaml"), "absent.yaml")


def test_info(run, vlm, random_folder):
    code, out, err = run("info")
    assert (code, err) == (0, "") and "torch" in out and "wkv6" in out
    code, out, _ = run("info", random_folder)
    assert code == 0
    assert f"{sum(p.numel() for p in vlm.model.rwkv.parameters()):,} parameters" in out
    chat = vlm.chat()
    chat.say("What?", max_new_tokens=1)
    assert f"{chat.nbytes:,} bytes for each conversation" in out
    refused(run("info", "nowhere/at/all"), "nowhere/at/all")


def test_flops_of_a_token_match_a_count_by_torch(vlm):
    from torch.utils.flop_counter import FlopCounterMode

    from visualrwkv.info import model_sizes
    from visualrwkv.ops import use_kernel

    text = vlm.model.config.text_config
    told = int(dict(model_sizes(vlm.model))["one token"].split()[0].replace(",", ""))
    recurrence = 5 * text.attention_size * text.head_size * text.num_hidden_layers
    state = vlm.model(torch.tensor([[5]])).cache
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_kernel(False):
        vlm.model(torch.tensor([[7]]), cache=state)
    # torch counts matrix products alone, of which the recurrence may or may not make use
    assert told - recurrence <= counter.get_total_flops() <= told * 1.05


def test_a_full_disk_is_one_line(run, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device", "out/model.safetensors")

    monkeypatch.setattr(cli, "run_info", full)
    refused(run("info"), "out/model.safetensors: No space left on device")


def test_memory_that_runs_out_is_one_line_and_other_errors_are_not_hidden(run, monkeypatch):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        monkeypatch.setattr(cli, "run_info", lambda _, error=error: (_ for _ in ()).throw(error))
        refused(run("info"), "out of memory")
    monkeypatch.setattr(cli, "run_info", lambda _: (_ for _ in ()).throw(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["info"])


def test_ctrl_c_and_a_closed_pipe_are_quiet(random_folder):
    command = [sys.executable, "-m", "visualrwkv.cli"]
    chat = subprocess.Popen(
        [*command, "chat", "--model", str(random_folder), *SHORT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background makes them, and all they start, deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    chat.stdin.write("What?\n")
    chat.stdin.flush()
    assert chat.stdout.readline()
    time.sleep(0.2)
    chat.send_signal(signal.SIGINT)
    _, err = chat.communicate(timeout=60)
    assert (chat.returncode, err) == (130, "")

    info = subprocess.Popen([*command, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    info.stdout.close()
    err = info.stderr.read()
    assert (info.wait(timeout=60), err) == (141, "")


def test_closed_streams_are_no_reason_to_fail(tmp_path):
    for closed in ([1], [2], [0, 1, 2]):
        out = tmp_path / f"scenes{len(closed)}{closed[0]}"
        done = subprocess.run(
            [sys.executable, "-m", "visualrwkv.cli", "scenes", str(out), "--pictures", "1"],
            preexec_fn=lambda closed=closed: [os.close(number) for number in closed],
            timeout=60,
        )
        assert done.returncode == 0 and (out / "train.json").is_file()


@pytest.mark.skipif(shutil.which("false") is None, reason="needs a compiler that fails")
def test_why_the_first_answer_takes_long_is_said_in_a_line_each(random_folder, picture_file, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "false"}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-m", "visualrwkv.cli", "ask", str(picture_file), "What?", "--model", str(random_folder)]
    for expected in (["building the compiled kernels with false", "warning: the compiled"], ["warning: the compiled"]):
        done = subprocess.run([*command, *SHORT], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0 and done.stdout.count("\n") == 1
        lines = done.stderr.splitlines()
        assert len(lines) == len(expected), lines
        for line, start in zip(lines, expected, strict=True):
            assert line.startswith(f"visualrwkv: {start}"), line
