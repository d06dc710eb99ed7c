"""Makes the transformers Auto classes know VisualRWKV, without importing transformers for it.

The public way is `AutoConfig.register(...)` and its sisters. Called on import, these five cost four seconds (they load
the Auto modules, the tokenizer and the processor base classes). So the calls wait for the modules they belong to: an
import hook makes each one as soon as its Auto module has been imported, by whomever. Auto modules that are loaded
already are served at once.

transformers' modules import each other in circles, so nothing is registered while one of them, or one of ours, is still
half-way through its import: the calls are made when the outermost of these imports is finished.
"""

import importlib.abc
import importlib.machinery
import sys
import threading

MODEL_TYPE = "visualrwkv"
_AUTO = "transformers.models.auto."


def _register_config(auto):
    from visualrwkv.configuration import VisualRWKVConfig

    auto.AutoConfig.register(MODEL_TYPE, VisualRWKVConfig, exist_ok=True)


def _register_model(auto):
    from visualrwkv.configuration import VisualRWKVConfig
    from visualrwkv.modeling import VisualRWKVForConditionalGeneration

    auto.AutoModelForImageTextToText.register(VisualRWKVConfig, VisualRWKVForConditionalGeneration, exist_ok=True)


def _register_tokenizer(auto):
    from visualrwkv.configuration import VisualRWKVConfig
    from visualrwkv.tokenization import RWKVWorldTokenizer

    auto.AutoTokenizer.register(VisualRWKVConfig, tokenizer_class=RWKVWorldTokenizer, exist_ok=True)


def _register_image_processor(auto):
    from visualrwkv.configuration import VisualRWKVConfig
    from visualrwkv.image_processing import VisualRWKVImageProcessor

    # There is one class; naming it for both backends keeps transformers from warning that it falls back to the other.
    auto.AutoImageProcessor.register(
        VisualRWKVConfig,
        slow_image_processor_class=VisualRWKVImageProcessor,
        fast_image_processor_class=VisualRWKVImageProcessor,
        exist_ok=True,
    )


def _register_processor(auto):
    from visualrwkv.configuration import VisualRWKVConfig
    from visualrwkv.processing import VisualRWKVProcessor

    auto.AutoProcessor.register(VisualRWKVConfig, VisualRWKVProcessor, exist_ok=True)


class _AutoClassHook(importlib.abc.MetaPathFinder):
    """Watches imports of transformers and of this package until all registrations are made."""

    def __init__(self):
        self.waiting = {
            _AUTO + "configuration_auto": _register_config,
            _AUTO + "modeling_auto": _register_model,
            _AUTO + "tokenization_auto": _register_tokenizer,
            _AUTO + "image_processing_auto": _register_image_processor,
            _AUTO + "processing_auto": _register_processor,
        }
        self.importing = threading.local()  # .depth: how many watched imports this thread is inside of

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(("transformers.", "visualrwkv.")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def exec_module(module):
                self.importing.depth = getattr(self.importing, "depth", 0) + 1
                try:
                    execute(module)
                finally:
                    self.importing.depth -= 1
                self.register()

            spec.loader.exec_module = exec_module
        return spec

    def register(self):
        """Makes the registrations whose Auto module is there, unless a watched import is still under way."""
        if getattr(self.importing, "depth", 0):
            return
        for name in [name for name in self.waiting if name in sys.modules]:
            call = self.waiting.pop(name, None)
            if call is not None:
                call(sys.modules[name])
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def install():
    """Registers with the Auto classes that are loaded, and with the others when they get loaded. Idempotent."""
    if not any(isinstance(finder, _AutoClassHook) for finder in sys.meta_path):
        hook = _AutoClassHook()
        sys.meta_path.insert(0, hook)
        hook.register()
