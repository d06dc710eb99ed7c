"""Drawn scenes: pictures drawn by rule, with questions whose answers follow from the rule."""

from visualrwkv.scenes.descriptions import all_texts, caption, describe
from visualrwkv.scenes.drawing import draw
from visualrwkv.scenes.questions import KINDS, SHORT_KINDS, Question, ask, conversation, questions
from visualrwkv.scenes.variants import variants
from visualrwkv.scenes.world import Object, Scene, Sign, sample_scene, scene_rng, split_of

__all__ = [
    "KINDS",
    "SHORT_KINDS",
    "Object",
    "Question",
    "Scene",
    "Sign",
    "all_texts",
    "ask",
    "caption",
    "conversation",
    "describe",
    "draw",
    "questions",
    "sample_scene",
    "scene_rng",
    "split_of",
    "variants",
]
