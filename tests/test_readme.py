"""The examples of README and docs run: their Python as it stands, its commands as far as they are not hours of work."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_serve import running

from visualrwkv import cli, loading

ROOT = Path(__file__).parents[1]


def blocks(page):
    """(language, text) of each example on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def python_of(page):
    return [code for language, code in blocks(page) if language == "python"]


BLOCKS = blocks("README.md")
PYTHON = [*python_of("README.md"), *python_of("docs/chat.md")]
COMMANDS = [
    shlex.split(line, comments=True)
    for _, code in BLOCKS
    for line in code.splitlines()
    if line.startswith("visualrwkv ")
]


@pytest.fixture(autouse=True)
def a_place_with_the_files_named(tmp_path, monkeypatch, random_folder, pictures):
    """The examples' files; the random model stands in for the embedded one, so that only the code is judged."""
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    for name in ("docs/pictures/scene.png", "picture.png", "a.png", "b.png"):
        pictures[0].save(tmp_path / name)
    shutil.copytree(random_folder, tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "EMBEDDED", random_folder)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_examples(code):
    exec(compile(code, "example", "exec"), {})


def test_the_example_of_a_client(vlm, capsys):
    (code,) = python_of("docs/serve.md")
    with running(vlm) as (_, address):
        here = {"http://127.0.0.1:8000": address, "visualrwkv-tiny": "tiny-random"}
        for documented, tested in here.items():
            assert documented in code
            code = code.replace(documented, tested)
        exec(compile(code, "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_every_command_is_shown_and_parses():
    parsed = [cli.build_parser().parse_args(command[1:]) for command in COMMANDS]
    shown = {command[1] for command in COMMANDS}
    assert len(parsed) > len(shown) and shown == {
        *("ask", "chat", "demo", "serve", "scenes", "inspect", "train", "convert", "info"),
        *("eval", "score", "export", "report"),
    }


def test_short_commands_run(capsys):
    for command in COMMANDS:
        if command[1] in ("ask", "scenes", "info"):
            assert cli.main(command[1:]) == 0, command
    assert "Traceback" not in capsys.readouterr().err
    assert len(list(Path("out").rglob("*.png")) + list(Path("out").rglob("*.jpg"))) == 100
