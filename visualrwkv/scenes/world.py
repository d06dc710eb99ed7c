"""The world of drawn scenes: what a picture may hold, and how one is sampled.

A scene is a frozen description from which the picture follows byte by byte (``drawing.draw``) and from
which every answer follows too (``questions``). Lengths are pixels, x grows to the right and y downwards;
an object's centre and its bounding box are those of the drawn (already rotated) outline.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace
from itertools import combinations

from visualrwkv.errors import InputError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "pink": (250, 150, 190),
    "brown": (130, 80, 40),
    "gray": (130, 130, 130),
    "cyan": (60, 200, 210),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "hexagon")
ROTATED_SHAPES = ("triangle", "star", "square", "hexagon", "cross")
SIZES = {"small": (0.13, 0.17), "large": (0.25, 0.31)}  # bounding-box side / short side of the picture
SIGN_HEIGHT = (0.25, 0.31)
SIGN_TEXTS = tuple(str(number) for number in range(100)) + tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "light gray": (225, 225, 225),
    "black": (0, 0, 0),
    "beige": (240, 228, 200),
    "light blue": (200, 225, 245),
}
LIGHT_BACKGROUNDS = ("white", "light gray", "beige", "light blue")
LIGHT_INKS = ((250, 250, 250), (255, 220, 60), (90, 220, 235), (255, 165, 60), (255, 170, 205), (120, 230, 130))
DARK_INKS = ((10, 10, 10), (30, 40, 110), (170, 20, 20), (20, 105, 40), (100, 35, 140), (40, 80, 220), (220, 40, 40))
SIDES = (96, 512)
GAP = 0.03  # least distance between two boxes / short side
JITTER = 18
MAX_ROTATION = 20.0
MAX_NOISE = 8
SPLITS = ("train", "val", "test")
_PLACEMENT_TRIES = 60


@dataclass(frozen=True)
class Object:
    """One coloured shape. ``style`` in [0, 1] picks the proportions that the shape's name leaves open."""

    colour: str
    shape: str
    size: str
    rgb: tuple[int, int, int]
    cx: float
    cy: float
    side: float  # longer side of the bounding box
    rotation: float = 0.0  # degrees
    style: float = 0.5

    @property
    def box(self):
        """(x0, y0, x1, y1) of the rotated outline."""
        half_width, half_height = self.extent
        return self.cx - half_width, self.cy - half_height, self.cx + half_width, self.cy + half_height

    @property
    def extent(self):
        """Half of the bounding box's width and height."""
        points = outline(self.shape, self.style, self.rotation)
        if points is None:
            return self.side / 2, self.side / 2
        return self.side * max(x for x, _ in points), self.side * max(y for _, y in points)

    @property
    def key(self):
        """What may occur once in a picture."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A rounded card with a number (0 to 99) or a capital letter."""

    text: str
    card: tuple[int, int, int]
    ink: tuple[int, int, int]
    border: tuple[int, int, int] | None
    cx: float
    cy: float
    width: float
    height: float
    font_scale: float  # font size / card height

    @property
    def box(self):
        """(x0, y0, x1, y1) of the card."""
        return (
            self.cx - self.width / 2,
            self.cy - self.height / 2,
            self.cx + self.width / 2,
            self.cy + self.height / 2,
        )

    @property
    def extent(self):
        """Half of the card's width and height."""
        return self.width / 2, self.height / 2

    @property
    def is_number(self):
        """Whether the text is a number rather than a letter."""
        return self.text.isdigit()

    @property
    def key(self):
        """What may occur once in a picture."""
        return f"sign {self.text}"


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    ``top`` and ``bottom`` are the colours of the vertical background gradient (equal: a plain one); ``noise`` is
    the amplitude per channel, drawn from ``seed``, over the background alone or over everything.
    """

    width: int
    height: int
    background: str
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    noise: int
    noise_everywhere: bool
    seed: int
    objects: tuple[Object | Sign, ...]

    @property
    def short_side(self):
        """The shorter side of the picture in pixels."""
        return min(self.width, self.height)

    @property
    def shapes(self):
        """The objects that are not a sign, in their order."""
        return tuple(thing for thing in self.objects if isinstance(thing, Object))

    @property
    def sign(self):
        """The sign, or None."""
        return next((thing for thing in self.objects if isinstance(thing, Sign)), None)


def outline(shape, style, rotation):
    """Corners of a shape, turned by ``rotation`` degrees, scaled so that the longer side of the bounding box
    is 1, and shifted so that its centre is the origin. None for circle and ring.
    """
    if shape in ("circle", "ring"):
        return None
    if shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "triangle":
        points = [(0, 0), (0.5, 0.85 + 0.15 * style), (-0.5, 0.85 + 0.15 * style)]
    elif shape == "diamond":
        points = [(0, -1), (0.72 + 0.28 * style, 0), (0, 1), (-0.72 - 0.28 * style, 0)]
    elif shape == "cross":
        arm = 0.28 + 0.14 * style  # half the bar's thickness, where the arm reaches to 1
        corner = [(arm, -1), (arm, -arm), (1, -arm)]
        points = [(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in corner]
    elif shape == "hexagon":
        points = _radial([1.0] * 6, 0.0 if style < 0.5 else 30.0)
    else:
        points = _radial([1.0, 0.38 + 0.12 * style] * 5, -90.0)
    c, s = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    points = [(x * c - y * s, x * s + y * c) for x, y in points]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top, bottom = min(y for _, y in points), max(y for _, y in points)
    scale = 1 / max(right - left, bottom - top)
    return [((x - (left + right) / 2) * scale, (y - (top + bottom) / 2) * scale) for x, y in points]


def _radial(radii, start):
    """Corners at equal angles, beginning at ``start`` degrees."""
    angles = [math.radians(start + 360 * i / len(radii)) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def scene_rng(seed, split, index):
    """The random stream of picture ``index`` of a split: streams of different splits never meet."""
    if split not in SPLITS:
        raise InputError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")
    digest = hashlib.sha256(f"visualrwkv scene/{split}/{seed}/{index}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def split_of(keys):
    """The only split that may hold pictures with this list of objects (an iterable of ``key``)."""
    bucket = hashlib.sha256("|".join(sorted(keys)).encode()).digest()[0] % 20
    return {0: "val", 1: "test"}.get(bucket, "train")


def sample_scene(rng, *, min_objects=1, max_objects=6, sides=SIDES, sign_probability=0.35, split=None):
    """Samples a scene.

    Args:
        rng: a ``random.Random``; the scene is a function of its state.
        min_objects, max_objects: bounds of the uniform number of objects, within 1 to 6.
        sides: least and greatest width and height in pixels.
        sign_probability: how often one of the objects is a sign.
        split: "train", "val" or "test" keeps to the lists of objects of that split; None allows all.

    Returns:
        A ``Scene`` that meets ``is_valid``.
    """
    if not 1 <= min_objects <= max_objects <= 6:
        raise InputError(f"objects from {min_objects} to {max_objects} asked for; a scene holds 1 to 6")
    if not 32 <= sides[0] <= sides[1]:
        raise InputError(f"picture sides {sides[0]} to {sides[1]} asked for; give a rising range from 32 pixels up")
    if split is not None and split not in SPLITS:
        raise InputError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")
    width = rng.randint(*sides)
    height = rng.randint(max(sides[0], math.ceil(width * 3 / 4)), min(sides[1], width * 4 // 3))
    if rng.random() < 0.25:
        first, second = rng.sample(LIGHT_BACKGROUNDS, 2)
        background = f"{first} to {second}"
    else:
        background = first = second = rng.choice(tuple(BACKGROUNDS))
    count = rng.randint(min_objects, max_objects)
    has_sign = rng.random() < sign_probability
    while True:
        things = _sample_things(rng, count, has_sign)
        if split is not None and split_of(thing.key for thing in things) != split:
            continue
        placed = _place(rng, things, width, height)
        if placed is not None:
            break
    return Scene(
        width=width,
        height=height,
        background=background,
        top=BACKGROUNDS[first],
        bottom=BACKGROUNDS[second],
        noise=rng.randint(1, MAX_NOISE) if rng.random() < 0.5 else 0,
        noise_everywhere=rng.random() < 0.5,
        seed=rng.getrandbits(32),
        objects=tuple(placed),
    )


def _sample_things(rng, count, has_sign):
    """Objects and perhaps a sign, not yet sized or placed, all different."""
    colours, shapes = tuple(COLOURS), SHAPES
    kind = rng.random()
    if kind < 0.15:  # few shapes or few colours, so that counts above two are not rare
        shapes = tuple(rng.sample(SHAPES, 1 + (rng.random() < 0.5)))
    elif kind < 0.3:
        colours = tuple(rng.sample(colours, 1 + (rng.random() < 0.5)))
    things = {}
    while len(things) < count - has_sign:
        colour, shape = rng.choice(colours), rng.choice(shapes)
        thing = new_object(rng, colour, shape, "small" if rng.random() < 0.5 else "large")
        things.setdefault(thing.key, thing)
    things = list(things.values())
    if has_sign:
        things.append(_new_sign(rng, sample_text(rng)))
    rng.shuffle(things)
    return things


def sample_text(rng):
    return str(rng.randrange(100)) if rng.random() < 0.5 else rng.choice(SIGN_TEXTS[100:])


def new_object(rng, colour, shape, size):
    rgb = tuple(min(255, max(0, channel + rng.randint(-JITTER, JITTER))) for channel in COLOURS[colour])
    rotation = round(rng.uniform(-MAX_ROTATION, MAX_ROTATION), 2) if shape in ROTATED_SHAPES else 0.0
    return Object(colour, shape, size, rgb, 0.0, 0.0, rng.random(), rotation, round(rng.random(), 3))


def _new_sign(rng, text):
    dark = rng.random() < 0.5
    level = rng.randint(20, 60)
    card = (level, level, min(255, level + rng.choice((0, 0, 12, 30)))) if dark else (255, 255, 255)
    ink = rng.choice(LIGHT_INKS if dark else DARK_INKS)
    if rng.random() < 0.5:
        ink = (250, 250, 250) if dark else (10, 10, 10)
    border = rng.choice((None, (120, 120, 120), ink))
    return Sign(
        text, card, ink, border, 0.0, 0.0, round(rng.uniform(0.95, 1.35), 3), 0.0, round(rng.uniform(0.55, 0.8), 3)
    )


def _place(rng, things, width, height):
    """Sizes the things and finds each a place, the tall ones first; None if they do not fit."""
    short = min(width, height)
    sized = []
    for thing in things:
        if isinstance(thing, Sign):
            tall = round(rng.uniform(*SIGN_HEIGHT) * short, 2)
            sized.append(replace(thing, height=tall, width=round(tall * thing.width, 2)))
        else:
            sized.append(replace(thing, side=round(rng.uniform(*SIZES[thing.size]) * short, 2)))
    for _ in range(3):
        boxes, placed = [], {}
        for i in sorted(range(len(sized)), key=lambda i: -sized[i].extent[1]):
            spot = find_spot(rng, sized[i].extent, boxes, width, height)
            if spot is None:
                break
            placed[i] = replace(sized[i], cx=spot[0], cy=spot[1])
        else:
            return [placed[i] for i in range(len(sized))]
    return None


def find_spot(rng, extent, boxes, width, height):
    """A free centre for a box with these half sides; the new box is added to ``boxes``."""
    half_width, half_height = extent
    gap = GAP * min(width, height)
    for _ in range(_PLACEMENT_TRIES):
        cx = round(rng.uniform(half_width + 1, width - half_width - 1), 2)
        cy = round(rng.uniform(half_height + 1, height - half_height - 1), 2)
        box = (cx - half_width, cy - half_height, cx + half_width, cy + half_height)
        if all(_apart(box, other, gap) for other in boxes):
            boxes.append(box)
            return cx, cy
    return None


def _apart(a, b, gap):
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


def is_valid(scene):
    """Whether the scene keeps the rules: boxes inside the picture and apart, no object twice, at most one sign."""
    boxes = [thing.box for thing in scene.objects]
    keys = [thing.key for thing in scene.objects]
    inside = all(b[0] >= 0 and b[1] >= 0 and b[2] <= scene.width and b[3] <= scene.height for b in boxes)
    gap = GAP * scene.short_side - 1e-6
    return (
        1 <= len(keys) <= 6
        and inside
        and len(set(keys)) == len(keys)
        and sum(isinstance(thing, Sign) for thing in scene.objects) <= 1
        and all(_apart(a, b, gap) for a, b in combinations(boxes, 2))
    )
