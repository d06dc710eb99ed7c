"""Questions about a scene, with answers that follow from its list of objects.

Each question knows what it gives away (``facts``) and what must stay hidden for it to be worth asking (``asks``); two
questions fit into one sample if neither gives away what the other asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from visualrwkv.errors import InputError
from visualrwkv.scenes import phrases
from visualrwkv.scenes.descriptions import describe
from visualrwkv.scenes.drafts import BUILDERS, DIRECTIONS, Names
from visualrwkv.scenes.phrases import CHOICE_LINES, LANGUAGES, LETTERS, PHRASES, SHORT_LINE, object_name, usual_word
from visualrwkv.scenes.world import COLOURS, SHAPES

SHORT_KINDS = ("colour", "shape", "existence", "count", "relation", "neighbour", "compare", "read")
KINDS = (*SHORT_KINDS, "choice", "describe")
# Only learnt from, never scored: steps towards a kind that is hard to learn at once. "place" asks for the word that a
# relation asks to confirm; "told" is a choice that says its answer, so that only the letter is left to be found.
LESSONS = ("place", "told")
OPTIONS = (2, 3, 4, 4, 4, 5)
# How often a kind is tried first when a sample is filled.
KIND_WEIGHTS = {
    "colour": 1.0,
    "shape": 1.0,
    "existence": 1.2,
    "count": 1.4,
    "relation": 1.4,
    "neighbour": 3.0,
    "compare": 1.5,
    "read": 2.0,
    "choice": 1.4,
    "describe": 0.6,
}


@dataclass(frozen=True)
class Question:
    """One question in its final wording.

    ``options`` are those of a multiple-choice question, whose underlying kind is ``base``; ``facts`` is all that
    question and answer give away about the picture, ``asks`` the part that another question must not give away.
    """

    kind: str
    language: str
    text: str
    answer: str
    options: tuple[str, ...] | None = None
    base: str | None = None
    facts: frozenset[str] = frozenset()
    asks: frozenset[str] = frozenset()

    def fits(self, other):
        """Whether both may stand in one sample."""
        return not (self.facts & other.asks or other.facts & self.asks)


@dataclass(frozen=True)
class Wording:
    """How questions are put. Every share is the probability for one question.

    Args:
        vary: share of questions in another wording than the usual one.
        short_line: share of English short-answer questions that end with the line asking for a word or phrase.
        letter_line: share of multiple-choice questions that end with the line asking for the letter.
        bases: the kinds that a "choice" may be made of, each tried first as often as it is given.
        options: numbers of options that a "choice" may have, each as often as it is given.
    """

    vary: float = 0.5
    short_line: float = 0.5
    letter_line: float = 1.0
    bases: tuple[str, ...] = SHORT_KINDS
    options: tuple[int, ...] = OPTIONS

    def __post_init__(self):
        _checked(self.bases, SHORT_KINDS, "base of a choice")


def ask(scene, rng, kind, language="en", **wording):
    """One question of a kind, or None where the scene allows none.

    Args:
        rng: a ``random.Random``.
        kind: one of ``KINDS`` or ``LESSONS``.
        language: "en" or "zh".
        wording: fields of ``Wording``.
    """
    if kind not in KINDS + LESSONS:
        raise InputError(f"kind of question {kind!r} is not known; use some of {', '.join(KINDS + LESSONS)}")
    if language not in LANGUAGES:
        raise InputError(f"language {language!r} is not known; use en or zh")
    return _ask(scene, rng, kind, language, Wording(**wording), lambda draft: True)


def _ask(scene, rng, kind, language, wording, accept):
    """As ``ask``, but of the drafts only one that ``accept`` lets through (a description is always let through)."""
    if kind == "describe":
        everything = _everything(scene)
        text = _phrase(rng, language, "describe", wording.vary)
        return Question(kind, language, text, describe(scene, language), facts=everything, asks=everything)
    multiple = kind in ("choice", "told")
    tried = (kind,)
    if multiple:
        bases = wording.bases
        tried = bases if len(bases) == 1 else rng.sample(bases, len(bases))
    names, draft = Names(scene), None
    for name in tried:
        draft = draft or BUILDERS[name](names, rng, accept, wording.vary)
    if draft is None:
        return None
    text = _written(draft, scene, rng, language, wording.vary)
    answer = _spoken(draft.answer, language)
    facts, asks = frozenset(draft.facts), frozenset(draft.asks)
    if multiple:
        options = _options(draft, rng, language, answer, wording.options)
        if kind == "told":
            text = f"{text} {answer}"
        letter = LETTERS[options.index(answer)]
        lines = [text, *(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))]
        if wording.letter_line == 1 or rng.random() < wording.letter_line:
            lines.append(CHOICE_LINES[language])
        return Question(kind, language, "\n".join(lines), letter, options, draft.kind, facts, asks)
    if language == "en" and rng.random() < wording.short_line:
        text = f"{text}\n{SHORT_LINE}"
    return Question(kind, language, text, answer, None, None, facts, asks)


def _everything(scene):
    indices = range(len(scene.objects))
    attributes = {f"{word}:{i}" for i in indices for word in ("colour", "shape", "size", "x", "y")}
    return frozenset(attributes | {"total", "sign"} | {f"set:{word}" for word in (*COLOURS, *SHAPES)})


def _phrase(rng, language, phrase, vary):
    usual, *others = PHRASES[language][phrase]
    return rng.choice(others) if rng.random() < vary else usual


def _written(draft, scene, rng, language, vary):
    def word(language, word):
        others = phrases.ALIASES[language].get(word)
        return rng.choice(others) if others and rng.random() < 0.3 * vary else usual_word(language, word)

    def name(reference):
        if reference == ("sign",):
            return phrases.SIGN_NAME[language]
        size, colour, shape = reference
        return object_name(language, colour, shape, size, word)

    template = _phrase(rng, language, draft.phrase or draft.kind, vary)
    slots = {}
    if draft.kind == "count":
        slots["p"] = _counted(language, *draft.a, word)
    elif draft.a is not None:
        slots["a"] = name(draft.a)
        slots["an"] = phrases.article(slots["a"])
    if draft.b is not None:
        slots["b"] = name(draft.b)
    if draft.where is not None:
        usual, *others = phrases.DIRECTIONS[language][draft.where]
        slots["where"] = rng.choice(others) if rng.random() < vary / 2 else usual
    if draft.kind == "read":
        slots["t"] = phrases.TEXT_KIND[language][scene.sign.is_number]
    return template.format(**slots)


def _counted(language, phrase, word, speak):
    if phrase == "all":
        return "objects" if language == "en" else "物体"
    said = speak(language, word)
    if phrase == "shape":
        return phrases.plural(said) if language == "en" else said
    return f"{said} objects" if language == "en" else f"{said}的物体"


def _spoken(answer, language):
    kind, value = answer
    if kind == "word":
        return usual_word(language, value)
    if kind == "name":
        return object_name(language, *value)
    if kind == "direction":
        return phrases.DIRECTION_WORDS[language][value]
    if kind in ("existence", "relation"):
        return phrases.YES_NO[language][kind, value]
    return str(value)


def _options(draft, rng, language, answer, counts):
    """As many options as one of ``counts`` says, where there are so many, in random order, the right one among them."""
    kind = draft.answer[0]
    wrong = [said for said in (_spoken((kind, value), language) for value in draft.wrong) if said != answer]
    if kind == "name":
        few = wrong[:4]
        rng.shuffle(few)
        wrong = few
    else:
        rng.shuffle(wrong)
    options = [answer, *wrong[: rng.choice(counts) - 1]]
    rng.shuffle(options)
    return tuple(options)


def questions(scene, rng, kinds=KINDS, languages=LANGUAGES, **wording):
    """One question of each of the kinds that the scene allows; they may give away each other's answers.

    ``languages`` maps "en" and "zh" to weights, or names those that weigh the same; ``wording`` is fields of
    ``Wording``.
    """
    speakers, weights = _checked(languages, LANGUAGES, "language")
    asked = (ask(scene, rng, kind, rng.choices(speakers, weights)[0], **wording) for kind in kinds)
    return [question for question in asked if question is not None]


def conversation(scene, rng, turns, *, kinds=KIND_WEIGHTS, languages=LANGUAGES, relations=DIRECTIONS, **wording):
    """Questions for one training sample, none of which gives away another's answer.

    Args:
        rng: a ``random.Random``.
        turns: the most questions wanted; a scene of few objects holds fewer. A description always stands alone.
        kinds, languages: weights by name, or names that weigh the same.
        relations: which of left, right, above and below questions of the kind relation may name.
        wording: fields of ``Wording``.

    Returns:
        A list of at least one ``Question`` where the scene allows any of the kinds, in random order.
    """
    if turns < 1:
        raise InputError(f"{turns} turns asked for; a conversation has at least 1")
    pool, weights = _checked(kinds, KINDS + LESSONS, "kind of question")
    speakers, speaker_weights = _checked(languages, LANGUAGES, "language")
    places, _ = _checked(relations, DIRECTIONS, "relation")
    wording = Wording(**wording)
    chosen, remaining = [], dict(zip(pool, weights, strict=True))

    def accept(draft):
        if draft.kind == "relation" and draft.where not in places:
            return False
        return all(not (draft.facts & other.asks or other.facts & draft.asks) for other in chosen)

    while remaining and len(chosen) < turns:
        kind = rng.choices(tuple(remaining), tuple(remaining.values()))[0]
        language = rng.choices(speakers, speaker_weights)[0]
        question = _ask(scene, rng, kind, language, wording, accept)
        if question is None:
            del remaining[kind]
            continue
        chosen.append(question)
        remaining[kind] *= 0.3  # other kinds first, for the sake of variety
        if kind == "describe":
            break
        remaining.pop("describe", None)
    rng.shuffle(chosen)
    return chosen


def _checked(weights, known, what):
    """Names and weights, from a mapping or from names that all weigh the same."""
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(weights, 1)
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise InputError(f"{what} {unknown[0]!r} is not known; use some of {', '.join(known)}")
    positive = {name: weight for name, weight in weights.items() if weight > 0}
    if not positive:
        raise InputError(f"no {what} has a positive weight; give at least one of {', '.join(known)}")
    return tuple(positive), tuple(positive.values())
