"""Whole-picture texts: descriptions and captions, and everything that the world can say."""

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
    position_name,
)

_PLACES = ("center", "top", "bottom", "left", "right", "top left", "top right", "bottom left", "bottom right")


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
        kind = TEXT_KIND[language][thing.is_number]
        return f"a sign with the {kind} {thing.text}" if language == "en" else f"一个写着{thing.text}的牌子"
    name = object_name(language, thing.colour, thing.shape, thing.size)
    return phrases.article(name) if language == "en" else f"一个{name}"


def _sentence(parts, language):
    *rest, last = parts
    if language == "zh":
        return f"图中从左到右有{'、'.join(rest)}和{last}。" if rest else f"图中有{last}。"
    if not rest:
        return f"The image shows {last}."
    return f"The image shows, from left to right, {', '.join(rest)} and {last}."


def caption(scene, rng):
    """An English caption for contrastive training: every object with size, colour, shape and coarse position, the
    sign's text and the background, from left to right or in random order.
    """
    things = left_to_right(scene)
    if rng.random() < 0.5:
        rng.shuffle(things)
    parts = [f"{_part(thing, 'en')} {_place(position_name(scene, thing))}" for thing in things]
    return _caption_text(parts, scene.background)


def _place(position):
    return f"in the {position}" if position == "center" else f"at the {position}"


def _caption_text(parts, background):
    return f"{', '.join(parts)}, on {phrases.article(background)} background"


def all_texts():
    """Every phrasing with every word in every place where it can stand, for choosing a vocabulary.

    Words are varied one slot at a time, so the list is complete in what follows what but not in combinations.
    """
    yield SHORT_LINE
    for language in PHRASES:
        yield from _question_texts(language)
        yield from _answer_texts(language)
    backgrounds = [*BACKGROUNDS, *(f"{a} to {b}" for a, b in product(LIGHT_BACKGROUNDS, repeat=2) if a != b)]
    yield from (_caption_text(["a small red circle at the top left"], background) for background in backgrounds)
    things = [phrases.article(object_name("en", c, s, size)) for size, c, s in product(SIZES, COLOURS, SHAPES)]
    things += [f"a sign with the {TEXT_KIND['en'][text.isdigit()]} {text}" for text in SIGN_TEXTS]
    yield from (f"{thing} {_place(place)}, {thing} {_place(place)}" for thing, place in product(things, _PLACES))


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
    answers += [*phrases.YES_NO[language].values(), *SIGN_TEXTS, *LETTERS]
    yield from answers
    for letter, answer in product(LETTERS, answers):
        yield f"\n{letter}. {answer}\n{letter}. {answer}\n{CHOICE_LINES[language]}"
    parts = [object_name(language, c, s, size) for size, c, s in product(SIZES, COLOURS, SHAPES)]
    parts = [phrases.article(part) if language == "en" else f"一个{part}" for part in parts]
    for text in SIGN_TEXTS:
        kind = TEXT_KIND[language][text.isdigit()]
        parts.append(f"a sign with the {kind} {text}" if language == "en" else f"一个写着{text}的牌子")
    for part in parts:
        yield _sentence([part], language)
        yield _sentence([part, part, part], language)


def _all_words():
    return (*COLOURS, *SHAPES, *SIZES)
