"""The demo's figures, its words in two languages, and its examples."""

import re
import string
from pathlib import Path

import pytest
from demo_controls import SHORT

from visualrwkv.configuration import POSITIONS, SCANS

pytest.importorskip("gradio")

from visualrwkv.demo import examples, panel, texts


def test_figures_are_those_of_the_conversation(vlm, pictures):
    config = vlm.model.config.text_config
    empty = panel.figures(vlm)
    chat = vlm.chat()
    assert panel.figures(vlm, chat) == empty
    chat.say("What?", pictures[0], **SHORT)
    chat.say("Why?", **SHORT)
    numbers = panel.figures(vlm, chat)
    assert numbers.state_bytes == empty.state_bytes == chat.nbytes
    assert numbers.tokens_read == chat.tokens_read > vlm.model.config.num_image_tokens and numbers.turns == 2
    # keys and values of each layer in 16 bits
    assert numbers.cache_bytes == chat.tokens_read * config.num_hidden_layers * config.hidden_size * 2 * 2
    assert numbers.first_token_s == chat.stats.first_token_s > 0
    at = numbers.break_even
    assert numbers.cache_bytes_per_token * at > numbers.state_bytes >= numbers.cache_bytes_per_token * (at - 1)
    for language in texts.LANGUAGES.values():
        shown = panel.html(numbers, language)
        assert panel.size(chat.nbytes) in shown and f"{chat.tokens_read:,}" in shown


def test_sizes():
    assert [panel.size(n) for n in (0, 999, 4608, 156672, 13841203, 2**31)] == [
        *("0 B", "999 B", "4.5 KiB", "153 KiB", "13.2 MiB", "2.0 GiB"),
    ]


def test_every_text_is_there_in_both_languages():
    for key, pair in texts.TEXTS.items():
        fields = [{field for _, field, _, _ in string.Formatter().parse(words) if field} for words in pair]
        assert len(pair) == 2 and all(pair) and fields[0] == fields[1], key
    files = set(Path(panel.__file__).parent.glob("*.py")) - {Path(texts.__file__)}
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    literal = set(re.findall(r'["\'](\w+)["\']', source))
    built = {f"prompt_{name}" for name in POSITIONS} | {f"scan_{name}" for name in SCANS}
    assert set(texts.TEXTS) <= literal | built  # no text is left over
    assert [texts.language_of(header) for header in ("zh-CN,zh;q=0.9", "en-US,zh;q=0.5", None)] == ["zh", "en", "en"]


def test_examples_are_drawn_with_questions_in_both_languages(tmp_path):
    drawn = examples.draw(tmp_path / "new")
    assert len(drawn) == len({Path(example.picture).read_bytes() for example in drawn}) == 4
    for example in drawn:
        assert set(example.questions) == {"en", "zh"} and not example.questions["en"].isspace()
        assert re.search("[\u4e00-\u9fff]", example.questions["zh"])
