"""Pictures to begin with, drawn at start-up by the project's own scenes, each with a question in both languages."""

import random
from dataclasses import dataclass
from pathlib import Path

from visualrwkv import scenes

# kind of question and number of the scene; chosen for pictures that differ at a glance
EXAMPLES = (("colour", 1), ("read", 6), ("count", 7), ("describe", 14))


@dataclass(frozen=True)
class Example:
    """A picture file and a question about it by language."""

    picture: str
    questions: dict[str, str]


def draw(folder: Path) -> list[Example]:
    """Write the pictures into a folder (made if need be) and return the examples."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for kind, number in EXAMPLES:
        rng = scenes.scene_rng(7, "test", number)
        scene = scenes.sample_scene(
            rng, min_objects=3, max_objects=5, sign_probability=float(kind == "read"), split="test"
        )
        picture = folder / f"{kind}.png"
        scenes.draw(scene).save(picture)
        questions = {}
        for language in ("en", "zh"):
            # the same random numbers ask about the same thing in both languages
            question = scenes.ask(scene, random.Random(number), kind, language, vary=0, short_line=0)
            questions[language] = question.text
        examples.append(Example(str(picture), questions))
    return examples
