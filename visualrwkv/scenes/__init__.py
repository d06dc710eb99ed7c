"""Drawn scenes: pictures drawn by rule, with questions whose answers follow from the rule."""

from visualrwkv.scenes.descriptions import all_texts, describe, patch_captions
from visualrwkv.scenes.drawing import draw
from visualrwkv.scenes.questions import KINDS, SHORT_KINDS, Question, Wording, ask, conversation, questions
from visualrwkv.scenes.world import Object, Scene, Sign, sample_scene, scene_rng, split_of

__all__ = [
    "KINDS",
    "SHORT_KINDS",
    "Object",
    "Question",
    "Scene",
    "Sign",
    "Wording",
    "all_texts",
    "ask",
    "conversation",
    "describe",
    "draw",
    "patch_captions",
    "questions",
    "sample_scene",
    "scene_rng",
    "split_of",
]
