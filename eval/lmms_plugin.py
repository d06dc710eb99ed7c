"""The entry point of group `lmms_eval.models`: makes `lmms-eval --model visualrwkv` known, without loading anything."""


def manifest():
    """What lmms-eval needs to know about our model class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("visualrwkv", simple_class_path="visualrwkv.eval.lmms.VisualRWKVForLmmsEval")
