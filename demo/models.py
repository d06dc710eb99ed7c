"""The models that the operator offers, loaded when first picked. All ways of reading share one copy of the weights."""

import copy
import os
import threading
from pathlib import Path

import visualrwkv
from visualrwkv import InputError
from visualrwkv.configuration import POSITIONS, SCANS
from visualrwkv.demo.texts import text
from visualrwkv.paths import without_folders

EMBEDDED = "embedded"


class Models:
    """Models by the label that the browser sees: of a path its last part only, so that nothing of the disk shows.

    Args:
        names: what the operator passed, for `visualrwkv.load`, or "embedded"; the first one is loaded at once. The
            embedded model is always offered.
        device, dtype, quantize: for `visualrwkv.load`.

    Raises:
        InputError: the first model cannot be loaded.
    """

    def __init__(self, names=(), device="auto", dtype="auto", quantize=None):
        self._options = {"device": device, "dtype": dtype, "quantize": quantize}
        self._names = {}
        for name in names:
            if name == EMBEDDED:
                self._names[EMBEDDED] = None
            else:
                self._names[self._free_label(name)] = name
        self._names.setdefault(EMBEDDED, None)
        self._loaded, self._locks = {}, {label: threading.Lock() for label in self._names}
        first = self.get(self.labels[0])
        self.default = (self.labels[0], first.model.config.prompt, first.model.config.scan)

    @property
    def labels(self) -> list[str]:
        return list(self._names)

    def choices(self, language: str) -> list[tuple[str, str]]:
        """(shown, label) pairs for a menu."""
        return [(text(language, "embedded") if label == EMBEDDED else label, label) for label in self._names]

    def get(self, label: str, prompt: str | None = None, scan: str | None = None):
        """The model with a label, read in a certain way; by default as its checkpoint says.

        Raises:
            InputError: the label or the way of reading is not offered, or the model cannot be loaded.
        """
        if label not in self._names:
            raise InputError(f"{label!r} is not offered here; the models are {', '.join(self._names)}")
        if prompt not in (None, *POSITIONS) or scan not in (None, *SCANS):
            raise InputError(f"prompt {prompt!r}, scan {scan!r}: use one of {', '.join(POSITIONS)}; {', '.join(SCANS)}")
        key = (label, prompt, scan)
        if key not in self._loaded:
            with self._locks[label]:  # of each model its own: nobody waits for a model that others pick
                if not self.is_loaded(label):
                    self._loaded[label, None, None] = self._load(label)
                if key not in self._loaded:
                    self._loaded[key] = reading_as(self._loaded[label, None, None], prompt, scan)
        return self._loaded[key]

    def is_loaded(self, label: str) -> bool:
        """Whether a model is in memory."""
        return (label, None, None) in self._loaded

    def _load(self, label):
        name = self._names[label]
        try:
            return visualrwkv.load(name, **self._options)
        except InputError as error:
            if name is None or not self._loaded:  # the latter is told to the operator, at the start
                raise
            words = str(error)
            for path in (os.path.expanduser(name), name):
                words = words.replace(path, label)
            raise InputError(words) from None

    def owner(self, file: Path, setting: tuple):
        """Continue a saved conversation with the model in use, as it was held.

        Returns:
            The setting (label, prompt, scan) and the conversation.
        Raises:
            InputError: the file is unusable, or belongs to another model.
        """
        label, prompt, scan = setting
        errors = []
        for way in sorted(SCANS, key=lambda way: way != scan):  # the present scan first
            try:
                chat = self.get(label, prompt, way).chat.load(file)
                return (label, chat.prompt, way), chat
            except InputError as error:
                errors.append(error)
        raise errors[0]

    def _free_label(self, name):
        label, number = without_folders(name), 1
        while label in (*self._names, EMBEDDED):
            number += 1
            label = f"{label.removesuffix(f' ({number - 1})')} ({number})"
        return label


def reading_as(vlm, prompt: str | None = None, scan: str | None = None):
    """The same model and weights with another place for the picture or another scan."""
    model, processor = copy.copy(vlm.model), copy.copy(vlm.processor)  # modules and tensors stay shared
    model.config = copy.deepcopy(vlm.model.config)
    model.config.prompt = processor.prompt = prompt or vlm.model.config.prompt
    model.config.scan = scan or vlm.model.config.scan
    return visualrwkv.VisualRWKV(model, processor)
