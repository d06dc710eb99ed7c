"""Draws a scene. Every object is a mask drawn at four times its size in a tile of its own, reduced by LANCZOS and
pasted in its colour, so that a picture costs a few milliseconds and depends on nothing but the scene.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visualrwkv.scenes.world import Sign, outline

OVERSAMPLING = 4
_MARGIN = 2  # pixels around a tile, room for the reduction filter


def draw(scene):
    """Draws the scene.

    Returns:
        An RGB ``PIL.Image`` of ``scene.width`` x ``scene.height``; equal scenes give equal bytes.
    """
    image = _background(scene)
    if scene.noise and not scene.noise_everywhere:
        image = _add_noise(image, scene)
    for thing in scene.objects:
        _draw_sign(image, thing) if isinstance(thing, Sign) else _draw_object(image, thing)
    if scene.noise and scene.noise_everywhere:
        image = _add_noise(image, scene)
    return image


def _background(scene):
    if scene.top == scene.bottom:
        return Image.new("RGB", (scene.width, scene.height), scene.top)
    share = np.linspace(0.0, 1.0, scene.height)[:, None]
    rows = np.rint((1 - share) * np.array(scene.top) + share * np.array(scene.bottom)).astype(np.uint8)
    return Image.fromarray(rows[:, None]).resize((scene.width, scene.height), Image.Resampling.NEAREST)


def _add_noise(image, scene):
    """Adds uniform integers from -noise to noise to each channel, clipped to a byte."""
    rng = np.random.default_rng(scene.seed)
    size = (scene.height, scene.width, 3)
    total = np.asarray(image).astype(np.int16)
    total += rng.integers(-scene.noise, scene.noise + 1, size=size, dtype=np.int8)
    return Image.fromarray(np.clip(total, 0, 255, out=total).astype(np.uint8))


class _Tile:
    """A mask at four times the size over the pixels that a box touches."""

    def __init__(self, box):
        self.x = int(box[0]) - _MARGIN
        self.y = int(box[1]) - _MARGIN
        self.size = (int(box[2]) + 1 + _MARGIN - self.x, int(box[3]) + 1 + _MARGIN - self.y)
        self.clear()

    def clear(self):
        """Starts a new mask over the same pixels."""
        self.mask = Image.new("L", (self.size[0] * OVERSAMPLING, self.size[1] * OVERSAMPLING))
        self.pen = ImageDraw.Draw(self.mask)

    def at(self, x, y):
        """Mask coordinates of a picture point; a pixel's centre has whole mask coordinates, hence the half."""
        return round((x - self.x) * OVERSAMPLING - 0.5, 2), round((y - self.y) * OVERSAMPLING - 0.5, 2)

    def span(self, box, inset=0.0):
        """A box in mask coordinates, for ellipses and cards."""
        return (*self.at(box[0] + inset, box[1] + inset), *self.at(box[2] - inset, box[3] - inset))

    def paste(self, image, rgb):
        """Reduces the mask and pastes the colour through it."""
        image.paste(rgb, (self.x, self.y), self.mask.resize(self.size, Image.Resampling.LANCZOS))


def _draw_object(image, thing):
    tile = _Tile(thing.box)
    points = outline(thing.shape, thing.style, thing.rotation)
    if points is not None:
        corners = [tile.at(thing.cx + thing.side * x, thing.cy + thing.side * y) for x, y in points]
        tile.pen.polygon(corners, fill=255)
    else:
        tile.pen.ellipse(tile.span(thing.box), fill=255)
        if thing.shape == "ring":
            hole = 0.5 + 0.16 * thing.style  # inner diameter / outer diameter
            tile.pen.ellipse(tile.span(thing.box, thing.side * (1 - hole) / 2), fill=0)
    tile.paste(image, thing.rgb)


def _draw_sign(image, sign):
    tile = _Tile(sign.box)
    radius = 0.14 * sign.height * OVERSAMPLING
    if sign.border is not None:
        tile.pen.rounded_rectangle(tile.span(sign.box), radius, fill=255)
        tile.paste(image, sign.border)
        tile.clear()
    inset = 0.0 if sign.border is None else max(1.0, 0.03 * sign.height)
    tile.pen.rounded_rectangle(tile.span(sign.box, inset), max(1.0, radius - inset * OVERSAMPLING), fill=255)
    tile.paste(image, sign.card)
    tile.clear()
    size = sign.font_scale * sign.height * OVERSAMPLING
    left, top, right, bottom = _font(round(size)).getbbox(sign.text)
    room = 0.82 * sign.width * OVERSAMPLING
    if right - left > room:
        size *= room / (right - left)
        left, top, right, bottom = _font(round(size)).getbbox(sign.text)
    x, y = tile.at(sign.cx, sign.cy)
    corner = (round(x - (left + right) / 2), round(y - (top + bottom) / 2))
    tile.pen.text(corner, sign.text, fill=255, font=_font(round(size)))
    tile.paste(image, sign.ink)


@lru_cache(maxsize=64)
def _font(size):
    """The scalable font that Pillow carries, at a size in pixels."""
    return ImageFont.load_default(size)
