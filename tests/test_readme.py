"""The README's examples run: its Python as it stands, its commands as far as they are not hours of work."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from visualrwkv import cli, loading

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
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
    exec(compile(code, str(README), "exec"), {})


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
