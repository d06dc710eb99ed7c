"""Descriptions of whole pictures, captions of patches, and everything that the world can say."""

from itertools import product

from visualrwkv.errors import InputError
from visualrwkv.scenes import phrases
from visualrwkv.scenes.phrases import CHOICE_LINES, LETTERS, PHRASES, SHORT_LINE, SIGN_NAME, TEXT_KIND, object_name
from visualrwkv.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    LIGHT_BACKGROUNDS,
    SHAPES,
    SIGN_TEXTS,
    SIZES,
    Sign,
)

_PART_OF, _BACKGROUND = "part of", "background"


def left_to_right(scene):
    """The objects and the sign by their centres, from left to right (above first where they are level)."""
    return sorted(scene.objects, key=lambda thing: (thing.cx, thing.cy))


def describe(scene, language="en"):
    """One sentence that names every object with size, colour and shape, from left to right, and the sign's text."""
    if language not in PHRASES:
        raise InputError(f"language {language!r} is not known; use en or zh")
    parts = [_part(thing, language) for thing in left_to_right(scene)]
    return _sentence(parts, language)


def _part(thing, language):
    if isinstance(thing, Sign):
        return _sign(thing.text, language)
    return _object(thing.size, thing.colour, thing.shape, language)


def _object(size, colour, shape, language):
    name = object_name(language, colour, shape, size)
    return phrases.article(name) if language == "en" else f"一个{name}"


def _sign(text, language):
    return f"a sign with the {TEXT_KIND['en'][text.isdigit()]} {text}" if language == "en" else f"一个写着{text}的牌子"


def _sentence(parts, language):
    *rest, last = parts
    if language == "zh":
        return f"图中从左到右有{'、'.join(rest)}和{last}。" if rest else f"图中有{last}。"
    if not rest:
        return f"The image shows {last}."
    return f"The image shows, from left to right, {', '.join(rest)} and {last}."


def patch_captions(scene, grid, rng):
    """English captions for the contrastive stage, each of one patch of the picture.

    Args:
        scene: the scene.
        grid: rows and columns of patches over the whole picture.
        rng: a ``random.Random``.

    Returns:
        (patch, caption) pairs, patches counted row by row: first the patch under the centre of every thing with its
        name; then, for every thing, one of the other patches that its box touches, with "part of" before the name;
        last one patch that no box touches, with the background. What has no patch of its own is left out.
    """
    rows, columns = grid

    def row_column(x, y):
        return min(rows - 1, int(y / scene.height * rows)), min(columns - 1, int(x / scene.width * columns))

    centres, touched = {}, {}
    for thing in scene.objects:
        row, column = row_column(thing.cx, thing.cy)
        centres.setdefault(row * columns + column, []).append(thing)
        (top, left), (bottom, right) = row_column(*thing.box[:2]), row_column(*thing.box[2:])
        for patch in (r * columns + c for r in range(top, bottom + 1) for c in range(left, right + 1)):
            touched.setdefault(patch, []).append(thing)
    named = [(patch, _part(things[0], "en")) for patch, things in centres.items() if len(things) == 1]
    edges = {}
    for patch, things in touched.items():
        if len(things) == 1 and patch not in centres:
            edges.setdefault(_part(things[0], "en"), []).append(patch)
    parts = [(rng.choice(patches), f"{_PART_OF} {name}") for name, patches in edges.items()]
    free = [patch for patch in range(rows * columns) if patch not in touched]
    empty = [(rng.choice(free), f"{scene.background} {_BACKGROUND}")] if free else []
    return named + parts + empty


def names_thing(caption):
    """Whether a caption of ``patch_captions`` names a whole thing."""
    return not caption.startswith(_PART_OF) and not caption.endswith(_BACKGROUND)


def all_texts():
    """Every phrasing with every word in every place where it can stand, for choosing a vocabulary.

    Words are varied one slot at a time, so the list is complete in what follows what but not in combinations.
    """
    yield SHORT_LINE
    for language in PHRASES:
        yield from _question_texts(language)
        yield from _answer_texts(language)
    backgrounds = [*BACKGROUNDS, *(f"{a} to {b}" for a, b in product(LIGHT_BACKGROUNDS, repeat=2) if a != b)]
    yield from (f"{background} {_BACKGROUND}" for background in backgrounds)
    yield from (f"{_PART_OF} {part}" for part in _all_parts("en"))


def _question_texts(language):
    words = {word: (phrases.WORDS[language][word], *phrases.ALIASES[language].get(word, ())) for word in _all_words()}
    joint = " " if language == "en" else "的"
    names = [joint.join(parts) for c, s in product(COLOURS, SHAPES) for parts in product(words[c], words[s])]
    names += [f"{said}{joint}{name}" for size in SIZES for said in words[size] for name in names]
    sized = [f"{a}{joint}{b}" for size, s in product(SIZES, SHAPES) for a, b in product(words[size], words[s])]
    shapes = [said for shape in SHAPES for said in words[shape]]
    colours = [said for colour in COLOURS for said in words[colour]]
    counted = shapes + [f"{colour}的物体" for colour in colours] + ["物体"]
    if language == "en":
        counted = (
            [phrases.plural(shape) for shape in shapes] + [f"{colour} objects" for colour in colours] + ["objects"]
        )
    things = [*names, SIGN_NAME[language]]
    places = [place for options in phrases.DIRECTIONS[language].values() for place in options]
    fillings = {
        "colour": [{"a": name} for name in shapes + sized],
        "shape": [{"a": name} for name in colours],
        "existence": [{"a": name, "an": phrases.article(name)} for name in names],
        "count": [{"p": name} for name in counted],
        "relation": [{"a": name, "b": name, "where": places[i % len(places)]} for i, name in enumerate(things)]
        + [{"a": things[0], "b": things[0], "where": place} for place in places],
        "neighbour": [{"a": name, "where": places[i % len(places)]} for i, name in enumerate(names)]
        + [{"a": name, "where": place} for name in names[:1] for place in places],
        "place": [{"a": name} for name in names],
        "seen_from": [{"a": name, "b": name} for name in names],
        "larger": [{"a": name, "b": name} for name in names],
        "smaller": [{"a": name, "b": name} for name in names],
        "read": [{"t": kind} for kind in TEXT_KIND[language].values()],
        "describe": [{}],
    }
    for kind, templates in PHRASES[language].items():
        for template, filling in product(templates, fillings[kind]):
            yield template.format(**filling)
            if kind != "describe" and filling is fillings[kind][0]:
                yield f"{template.format(**filling)}\nA. 1"
                if language == "en":
                    yield f"{template.format(**filling)}\n{SHORT_LINE}"


def _answer_texts(language):
    answers = [object_name(language, c, s) for c, s in product(COLOURS, SHAPES)]
    answers += [phrases.WORDS[language][word] for word in _all_words()]
    answers += [*phrases.YES_NO[language].values(), *phrases.DIRECTION_WORDS[language].values(), *SIGN_TEXTS, *LETTERS]
    yield from answers
    for letter, answer in product(LETTERS, answers):
        yield f"\n{letter}. {answer}\n{letter}. {answer}\n{CHOICE_LINES[language]}"
    for part in _all_parts(language):
        yield _sentence([part], language)
        yield _sentence([part, part, part], language)


def _all_parts(language):
    objects = [_object(size, c, s, language) for size, c, s in product(SIZES, COLOURS, SHAPES)]
    return objects + [_sign(text, language) for text in SIGN_TEXTS]


def _all_words():
    return (*COLOURS, *SHAPES, *SIZES)
