"""VisualRWKV: questions about pictures, answered by a recurrent language model with a state of fixed size.

Importing this package registers the transformers Auto classes and does nothing else: every name below is loaded when
it is first used.
"""

import importlib

from visualrwkv import registration
from visualrwkv.errors import InputError

__version__ = "0.1.0"

_HOME = {
    "load": "loading",
    "VisualRWKV": "chat",
    "ChatSession": "session",
    "Sampling": "sampling",
    "VisualRWKVConfig": "configuration",
    "VisualRWKVForConditionalGeneration": "modeling",
    "VisualRWKVProcessor": "processing",
    "VisualRWKVImageProcessor": "image_processing",
    "RWKVWorldTokenizer": "tokenization",
    "RWKVState": "state",
}

__all__ = ["InputError", "__version__", *_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})


registration.install()
