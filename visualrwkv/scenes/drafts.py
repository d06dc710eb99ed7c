"""Builds the questions of a scene before their wording.

Every builder lists the questions of its kind that have exactly one right answer, so an ambiguous one is never asked,
keeps those that ``accept`` lets through and picks one. Facts are written as "colour:2", "shape:2", "size:2", "x:2",
"y:2" (of the object with that index), "set:red" (how many there are), "total", "sign" and "zero" (a count of nothing,
of which a sample holds one at most).
"""

from collections import Counter
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from visualrwkv.scenes import phrases
from visualrwkv.scenes.world import COLOURS, SHAPES, SIGN_TEXTS, Sign

LEAST_DISTANCE = 0.15  # of the short side, for left/right and above/below
DIRECTIONS = ("left", "right", "above", "below")
_COUNT_WEIGHTS = {0: 1.0, 1: 1.5, 2: 2.5}


@dataclass(frozen=True)
class Draft:
    """A question before its wording.

    ``answer`` is a (type, value) pair, ``wrong`` the values of false options; ``phrase`` names its templates where they
    are not called as the kind.
    """

    kind: str
    answer: tuple
    facts: frozenset
    asks: frozenset
    a: tuple | None = None
    b: tuple | None = None
    where: str | None = None
    wrong: tuple = ()
    phrase: str | None = None


class Point(NamedTuple):
    """A place in a picture, in pixels."""

    cx: float
    cy: float


def direction(scene, a, b):
    """Where ``a`` is seen from ``b``: "left", "right", "above" or "below", or None where no word is clearly right."""
    dx, dy = a.cx - b.cx, a.cy - b.cy
    least = LEAST_DISTANCE * scene.short_side
    if abs(dx) >= least and abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= least and abs(dy) > abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _half_plane(scene, a, where):
    """The things, the sign included, whose centre is on that side of ``a``, however near."""
    axis, sign = {"left": ("cx", -1), "right": ("cx", 1), "above": ("cy", -1), "below": ("cy", 1)}[where]
    return [b for b in scene.objects if sign * (getattr(b, axis) - getattr(a, axis)) > 0]


class Names:
    """Which names single out one object of a scene."""

    def __init__(self, scene):
        self.scene = scene
        self.index = {thing.key: i for i, thing in enumerate(scene.objects)}
        shapes = scene.shapes
        self.pairs = Counter((thing.colour, thing.shape) for thing in shapes)
        self.colours = Counter(thing.colour for thing in shapes)
        self.shapes = Counter(thing.shape for thing in shapes)

    def unique(self, thing):
        """Whether colour and shape alone single it out."""
        return self.pairs[thing.colour, thing.shape] == 1

    def reference(self, thing, rng, size_share):
        """(size or None, colour, shape) that singles the object out; ("sign",) for the sign."""
        if isinstance(thing, Sign):
            return ("sign",)
        size = thing.size if not self.unique(thing) or rng.random() < size_share else None
        return size, thing.colour, thing.shape

    def facts(self, *references_of):
        """What naming these (thing, reference) pairs gives away."""
        given = set()
        for thing, reference in references_of:
            if reference == ("sign",):
                given.add("sign")
                continue
            given |= {f"set:{thing.colour}", f"set:{thing.shape}"}
            # A twin that differs in size alone is given away with it: that is what the size is named for.
            for i, other in enumerate(self.scene.objects):
                if not isinstance(other, Sign) and (other.colour, other.shape) == (thing.colour, thing.shape):
                    given |= {f"colour:{i}", f"shape:{i}"}
            if reference[0] is not None:
                given.add(f"size:{self.index[thing.key]}")
        return given

    def attributes(self, colour=None, shape=None):
        """Hidden attributes that would settle whether a colour and a shape meet in one object."""
        of_shape = {f"colour:{i}" for i, t in enumerate(self.scene.objects) if getattr(t, "shape", "") == shape}
        of_colour = {f"shape:{i}" for i, t in enumerate(self.scene.objects) if getattr(t, "colour", "") == colour}
        return of_shape | of_colour


def _colour(names, rng, accept, vary):
    drafts = []
    by_size = Counter((thing.size, thing.shape) for thing in names.scene.shapes)
    for i, thing in enumerate(names.scene.objects):
        if isinstance(thing, Sign):
            continue
        alone = names.shapes[thing.shape] == 1
        sized = by_size[thing.size, thing.shape] == 1
        if alone or sized:
            size = thing.size if not alone or (sized and rng.random() < 0.25) else None
            reference = (size, None, thing.shape)
            facts = names.facts((thing, reference))
            answer = ("word", thing.colour)
            drafts.append(Draft("colour", answer, facts, {f"colour:{i}"}, reference, wrong=tuple(COLOURS)))
    return _pick(drafts, rng, accept)


def _shape(names, rng, accept, vary):
    drafts = []
    for i, thing in enumerate(names.scene.objects):
        if not isinstance(thing, Sign) and names.colours[thing.colour] == 1:
            reference = (None, thing.colour, None)
            facts = names.facts((thing, reference))
            drafts.append(Draft("shape", ("word", thing.shape), facts, {f"shape:{i}"}, reference, wrong=SHAPES))
    return _pick(drafts, rng, accept)


def _existence(names, rng, accept, vary):
    def draft(colour, shape, found):
        sets = {f"set:{colour}", f"set:{shape}"}
        asks = names.attributes(colour, shape) | sets
        return Draft("existence", ("existence", found), asks, asks, (None, colour, shape), wrong=(not found,))

    present = set(names.pairs)
    yes = _pick([draft(*pair, True) for pair in sorted(present)], rng, accept)
    # A sample that has no room for a "yes" gets no "no" either: the answers stay balanced.
    if yes is None or rng.random() < 0.5:
        return yes
    # Mostly near misses: both words occur in the picture, but not together; or one of them does.
    known_colour, known_shape = rng.choices(((True, True), (True, False), (False, True), (False, False)), (8, 4, 4, 4))[
        0
    ]
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
    rng.shuffle(absent)
    absent.sort(
        key=lambda pair: (known_colour and pair[0] not in names.colours) + (known_shape and pair[1] not in names.shapes)
    )
    for pair in absent:
        no = draft(*pair, False)
        if accept(no):
            return no
    return yes


def _count(names, rng, accept, vary):
    things = names.scene.objects
    values = {len(things): [("all", None)]}
    for phrase, words, counts in (("shape", SHAPES, names.shapes), ("colour", COLOURS, names.colours)):
        for word in words:
            values.setdefault(counts[word], []).append((phrase, word))
    # Absent things are many and high counts rare, so the value is drawn before the thing that is counted, and before
    # looking at what is acceptable: else a sample that gives much away would be filled with zeros.
    value = rng.choices(tuple(values), [_COUNT_WEIGHTS.get(v, 3.0) for v in values])[0]
    drafts = []
    for phrase, word in values[value]:
        if phrase == "all":
            facts = {f"{name}:{i}" for i in range(len(things)) for name in ("colour", "shape", "size")} | {"total"}
            asks = facts
        else:
            asks = {f"set:{word}"} if value else {f"set:{word}", "zero"}
            facts = asks | {f"{phrase}:{i}" for i, thing in enumerate(things) if getattr(thing, phrase, None) == word}
        wrong = tuple(n for n in range(max(0, value - 3), value + 4))
        drafts.append(Draft("count", ("number", value), facts, asks, (phrase, word), wrong=wrong))
    return _pick(drafts, rng, accept)


def _positions(axis_of, *indices):
    axis = "x" if axis_of in ("left", "right") else "y"
    return {f"{axis}:{i}" for i in indices}


def _relation(names, rng, accept, vary):
    drafts = []
    for a, b in permutations(names.scene.objects, 2):
        where = direction(names.scene, a, b)
        if where is None or ((isinstance(a, Sign) or isinstance(b, Sign)) and rng.random() < 0.6):
            continue
        references = names.reference(a, rng, 0.2 * vary), names.reference(b, rng, 0.2 * vary)
        asks = _positions(where, names.index[a.key], names.index[b.key])
        facts = names.facts((a, references[0]), (b, references[1])) | asks
        found = rng.random() < 0.5
        asked = where if found else phrases.OPPOSITE[where]
        drafts.append(Draft("relation", ("relation", found), facts, asks, *references, where=asked, wrong=(not found,)))
    return _pick(drafts, rng, accept)


def _place(names, rng, accept, vary):
    """Where an object is, seen from another one or from the middle of the picture: what a relation is made of."""
    drafts, scene = [], names.scene
    middle = Point(scene.width / 2, scene.height / 2)
    for a in scene.shapes:
        i, reference = names.index[a.key], names.reference(a, rng, 0.2 * vary)
        for b in (None, *scene.shapes):
            where = direction(scene, a, b or middle) if b is not a else None
            if where is None:
                continue
            if b is None:
                asks, references = _positions(where, i), (reference,)
            else:
                asks = _positions(where, i, names.index[b.key])
                references = reference, names.reference(b, rng, 0.2 * vary)
            facts = names.facts(*zip((a, b), references, strict=False)) | asks
            phrase = "place" if b is None else "seen_from"
            drafts.append(Draft("place", ("direction", where), facts, asks, *references, phrase=phrase))
    return _pick(drafts, rng, accept)


def _neighbour(names, rng, accept, vary):
    drafts = []
    for a in names.scene.shapes:
        for where in DIRECTIONS:
            beyond = _half_plane(names.scene, a, where)
            if len(beyond) != 1 or isinstance(beyond[0], Sign) or not names.unique(beyond[0]):
                continue
            b = beyond[0]
            if direction(names.scene, b, a) != where:
                continue
            i, j = names.index[a.key], names.index[b.key]
            reference = names.reference(a, rng, 0.2 * vary)
            asks = _positions(where, i, j) | {f"colour:{j}", f"shape:{j}"}
            facts = names.facts((a, reference), (b, (None,))) | asks
            answer, wrong = ("name", (b.colour, b.shape)), _other_names(names, rng, b)
            drafts.append(Draft("neighbour", answer, facts, asks, reference, where=where, wrong=wrong))
    return _pick(drafts, rng, accept)


def _other_names(names, rng, thing):
    """Plausible wrong names: the other objects first, then near misses of the right one."""
    others = [pair for pair in names.pairs if pair != (thing.colour, thing.shape)]
    rng.shuffle(others)
    near = [(c, thing.shape) for c in COLOURS if c != thing.colour] + [
        (thing.colour, s) for s in SHAPES if s != thing.shape
    ]
    rng.shuffle(near)
    return tuple(dict.fromkeys(others[:3] + near))


def _compare(names, rng, accept, vary):
    drafts = []
    for a, b in permutations(names.scene.shapes, 2):
        if a.size == b.size or not names.unique(a) or not names.unique(b):
            continue
        phrase = "smaller" if rng.random() < 0.2 * vary else "larger"
        winner, loser = (a, b) if (a.size == "large") == (phrase == "larger") else (b, a)
        references = (None, a.colour, a.shape), (None, b.colour, b.shape)
        asks = {f"size:{names.index[a.key]}", f"size:{names.index[b.key]}"}
        facts = names.facts((a, references[0]), (b, references[1])) | asks
        answer = (winner.colour, winner.shape)
        wrong = ((loser.colour, loser.shape),)
        drafts.append(Draft("compare", ("name", answer), facts, asks, *references, wrong=wrong, phrase=phrase))
    return _pick(drafts, rng, accept)


def _read(names, rng, accept, vary):
    sign = names.scene.sign
    if sign is None:
        return None
    wrong = tuple(rng.sample(SIGN_TEXTS[:100] if sign.is_number else SIGN_TEXTS[100:], 5))  # the right one is dropped
    return _pick([Draft("read", ("text", sign.text), {"sign"}, {"sign"}, wrong=wrong)], rng, accept)


def _pick(drafts, rng, accept):
    """A random draft among the acceptable ones, or None."""
    drafts = [draft for draft in drafts if accept(draft)]
    return rng.choice(drafts) if drafts else None


BUILDERS = {
    "colour": _colour,
    "shape": _shape,
    "existence": _existence,
    "count": _count,
    "relation": _relation,
    "place": _place,
    "neighbour": _neighbour,
    "compare": _compare,
    "read": _read,
}
