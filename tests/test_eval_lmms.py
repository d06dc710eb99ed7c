"""The lmms-eval adapter, against the real package where it is installed, else against a twin of its base class."""

import importlib
import importlib.metadata
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from visualrwkv.errors import InputError


class Base:
    """What lmms_eval.api.model.lmms (0.7.3) gives to its subclasses."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *arguments: None)

    rank = property(lambda self: self._rank)


@pytest.fixture(scope="module")
def adapter():
    """The adapter's module."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import lmms_eval.api.model  # noqa: F401
        except ImportError:
            twin = types.ModuleType("lmms_eval.api.model")
            twin.lmms = Base
            for name in ("lmms_eval", "lmms_eval.api"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setitem(sys.modules, twin.__name__, twin)
        yield importlib.import_module("visualrwkv.eval.lmms")
        sys.modules.pop("visualrwkv.eval.lmms")


@pytest.fixture(scope="module")
def model(adapter, random_folder):
    return adapter.VisualRWKVForLmmsEval(
        checkpoint=str(random_folder), image_position="first", batch_size="2", max_new_tokens=5, max_batch_size=8
    )


def requests(model, contexts, **options):
    documents = [{"image": picture} for picture, _ in contexts]
    model.task_dict["task"] = {"test": documents}
    visual = lambda document: [] if document["image"] is None else [document["image"]]  # noqa: E731
    return [
        SimpleNamespace(args=(text, options, visual, number, "task", "test"))
        for number, (_, text) in enumerate(contexts)
    ]


def test_replies_are_those_of_ask_in_the_order_of_the_requests(model, pictures):
    contexts = [
        (pictures[0], "What colour is the large thing?"),
        (None, "Red or blue?"),
        (pictures[1], "<image>\nRed?"),
    ]
    known = []
    model.cache_hook = SimpleNamespace(add_partial=lambda name, key, text: known.append((key[0], text)))
    replies = model.generate_until(requests(model, contexts, until=["\n\n"], max_new_tokens=6, temperature=0))
    assert model.vlm.processor.prompt == "first"
    wanted = [model.vlm.ask(picture, text.replace("<image>", ""), max_new_tokens=6) for picture, text in contexts]
    assert replies == wanted and len(set(replies)) > 1
    assert dict(known) == {text: reply for (_, text), reply in zip(contexts, wanted, strict=True)}


def test_stop_strings_and_the_default_length(model, pictures):
    contexts = [(pictures[0], "What colour?")]
    (whole,) = model.generate_until(requests(model, contexts))
    assert whole == model.vlm.ask(pictures[0], "What colour?", max_new_tokens=5)
    stop = whole[len(whole) // 2]
    (cut,) = model.generate_until(requests(model, contexts, until=stop))
    assert cut == whole[: whole.find(stop)].strip()


def test_a_question_of_nothing_takes_no_other_along(model, pictures):
    asked = requests(model, [(pictures[0], "What?"), (pictures[0], "<image>"), (pictures[1], "Why?"), (None, "")])
    first, nothing, second, again = model.generate_until(asked)
    expected = [
        model.vlm.ask(picture, text, max_new_tokens=5)
        for picture, text in zip(pictures, ["What?", "Why?"], strict=False)
    ]
    assert [first, second] == expected and nothing == again == ""


def test_what_it_cannot_do_is_said(adapter, model, pictures):
    with pytest.raises(InputError, match="image_position is 'top'; use one of middle"):
        adapter.VisualRWKVForLmmsEval(image_position="top")
    with pytest.raises(InputError, match="batch_size is 'auto'"):
        adapter.VisualRWKVForLmmsEval(batch_size="auto")
    for name, value in (("max_new_tokens", "x"), ("max_new_tokens", 0), ("max_new_tokens", None), ("batch_size", 0)):
        with pytest.raises(InputError, match=f"{name} is {value!r}; use a whole number from 1"):
            adapter.VisualRWKVForLmmsEval(**{name: value})
    with pytest.raises(InputError, match="temperature is 'x'"):
        model.generate_until(requests(model, [(pictures[0], "What?")], do_sample=True, temperature="x"))
    (asked,) = requests(model, [(pictures[0], "What?")])
    asked.args = ("What?", " ", *asked.args[2:])
    with pytest.raises(InputError, match="a continuation is empty"):
        model.loglikelihood([asked])
    with pytest.raises(InputError, match="num_beams is 3"):
        model.generate_until(requests(model, [(pictures[0], "What?")], num_beams=3))
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


def test_the_likeliest_of_given_answers_is_the_one_that_is_written(adapter, pictures):
    model = adapter.VisualRWKVForLmmsEval()
    question = "What color is the circle?"
    for picture in (pictures[0], None):
        reply = model.vlm.ask(picture, question)
        (asked,) = requests(model, [(picture, question)])
        found = {}
        for text in ("red", "blue", "yes", "3", reply):
            target = text if text == "red" else lambda document, text=text: text
            asked.args = (question, target, *asked.args[2:])
            ((found[text], greedy),) = model.loglikelihood([asked])
            assert greedy == (text == reply) and found[text] < 0
        assert max(found, key=found.get) == reply
        assert sum(map(math.exp, found.values())) < 1
    assert model.loglikelihood([]) == []


def test_the_real_registry_finds_it(monkeypatch):
    registry = pytest.importorskip("lmms_eval.models.registry_v2")
    from visualrwkv.eval.lmms_plugin import manifest

    entry = importlib.metadata.EntryPoint("visualrwkv", "visualrwkv.eval.lmms_plugin:manifest", "lmms_eval.models")
    monkeypatch.setattr(registry.ModelRegistryV2, "_select_entry_points", staticmethod(lambda group: [entry]))
    models = registry.ModelRegistryV2()
    models.load_entrypoint_manifests()
    assert models.resolve("visualrwkv").class_path == manifest().simple_class_path
    pytest.importorskip("lmms_eval.api.model")
    assert models.get_model_class("visualrwkv").__name__ == "VisualRWKVForLmmsEval"


def test_the_entry_point_is_declared():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."lmms_eval.models"]\nvisualrwkv = "visualrwkv.eval.lmms_plugin:manifest"\n' in text
