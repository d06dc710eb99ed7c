"""The order in which a layer reads the patches of an image.

A recurrent model sees only what came before. VisualRWKV lets other layers read the image span in another order, so
that every patch can learn of every other (arXiv 2406.13362, section 3.3). Text and the CLS feature keep their place;
the order is per sample and per image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from visualrwkv.errors import InputError

_CYCLES = {
    "bi": ("forward", "backward"),
    "uni": ("forward",),
    "multi": ("forward", "backward", "downward", "upward"),
}
SCANS = tuple(_CYCLES)


class Order(NamedTuple):
    """`x.gather(1, read)` puts positions in reading order, `.gather(1, restore)` undoes it. Both (B, T) int64."""

    read: Tensor
    restore: Tensor


def direction(scan: str, layer: int) -> str:
    """Reading direction of a layer, counted from 0."""
    cycle = _CYCLES[scan]
    return cycle[layer % len(cycle)]


def patch_order(name: str, rows: int, columns: int, device=None) -> Tensor:
    """Row-major patch indices (rows * columns,) in the order in which direction `name` reads them."""
    grid = torch.arange(rows * columns, device=device).view(rows, columns)
    order = (grid.t() if name in ("downward", "upward") else grid).reshape(-1)
    return order.flip(0) if name in ("backward", "upward") else order


def image_starts(is_image: Tensor, tokens_per_image: int) -> Tensor:
    """First position of every image.

    Args:
        is_image: (B, T) bool, True at the placeholders.
        tokens_per_image: features of one image.
    Returns:
        (images, 2) int64: row and first position, in reading order of the batch.
    Raises:
        InputError: a row where the placeholders do not form whole, unbroken images (a prompt cut inside an image).
    """
    places = is_image.nonzero()  # (placeholders, 2), row by row
    if len(places) == 0:
        return places.view(0, 2)
    per_row = is_image.sum(1)
    if (per_row % tokens_per_image).any():
        row = int((per_row % tokens_per_image).nonzero()[0])
        raise InputError(
            f"row {row} holds {int(per_row[row])} image placeholders, which is not a multiple of the "
            f"{tokens_per_image} features of one image; an image may not be cut"
        )
    images = places.view(-1, tokens_per_image, 2)
    if (images[:, -1, 1] - images[:, 0, 1] != tokens_per_image - 1).any():
        raise InputError("the placeholders of an image are interrupted by text; they must stand in one run")
    return images[:, 0]


def layer_orders(scan: str, layers: int, starts: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> list:
    """The reading order of each layer, None where it is the natural one.

    Args:
        starts: (images, 2) from `image_starts`.
        grid: rows and columns of patch features.
        shape: (B, T) of the sequence.
    Returns:
        list of `Order` or None, one per layer; equal orders share their tensors.
    """
    directions = [direction(scan, layer) for layer in range(layers)]
    if len(starts) == 0 or grid[0] * grid[1] < 2:
        return [None] * layers
    device = starts.device
    orders: dict[str, Order | None] = {"forward": None}
    for name in set(directions) - {"forward"}:
        natural = torch.arange(shape[1], device=device).expand(shape)
        patches = torch.arange(grid[0] * grid[1], device=device)
        row = starts[:, :1]  # (images, 1), broadcast over the patches
        places = starts[:, 1:] + patches  # (images, patches)
        sources = starts[:, 1:] + patch_order(name, *grid, device=device)
        read, restore = natural.clone(), natural.clone()
        read[row, places] = sources
        restore[row, sources] = places
        orders[name] = Order(read, restore)
    return [orders[name] for name in directions]


def pieces(length: int, longest: int, images: list[int], size: int) -> list[tuple[int, int]]:
    """Cut positions 0 to length into (begin, end) of at most `longest` positions, never inside an image.

    Args:
        images: first positions of all images, of all rows of a batch.
        size: positions of an image. A piece that is too short for an image is made as long as the image needs.
    """

    def cut(end):
        return [first for first in images if first < end < first + size]

    found, begin = [], 0
    while begin < length:
        end = min(begin + longest, length)
        while cut(end):
            end = min(cut(end))
        if end <= begin:
            end = min(begin + longest, length)
            while cut(end):
                end = max(cut(end)) + size
        found.append((begin, end))
        begin = end
    return found
