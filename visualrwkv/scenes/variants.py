"""Near-duplicates of a scene, the hard negatives of the contrastive stage."""

from dataclasses import replace

from visualrwkv.scenes.world import (
    COLOURS,
    SHAPES,
    SIZES,
    Sign,
    find_spot,
    is_valid,
    new_object,
    position_name,
    sample_text,
    split_of,
)


def _content(scene):
    """What a caption can tell of a scene; two scenes with equal content are no contrast."""
    return frozenset((thing.key, position_name(scene, thing)) for thing in scene.objects)


def variants(scene, rng, n, *, split=None):
    """Near-duplicates of a scene, each with one thing changed, as hard negatives.

    The change is a colour, a shape, a size, the sign's text, two things in each other's place or with each other's
    colour, or one thing removed or moved far. All are valid and tell apart by name or coarse position.

    Args:
        rng: a ``random.Random``.
        n: how many; fewer are returned only if the scene does not allow more.
        split: keeps to the lists of objects of that split; None allows all.
    """
    seen, found = {_content(scene)}, []
    for _ in range(30 * n):
        if len(found) == n:
            break
        candidate = _change(scene, rng)
        if candidate is None or _content(candidate) in seen or not is_valid(candidate):
            continue
        if split is not None and split_of(thing.key for thing in candidate.objects) != split:
            continue
        seen.add(_content(candidate))
        found.append(candidate)
    return found


def _change(scene, rng):
    """One random change, perhaps an invalid one; None where it does not apply."""
    things = list(scene.objects)
    i = rng.randrange(len(things))
    thing = things[i]
    change = rng.choice(("colour", "colour", "shape", "shape", "size", "swap", "swap", "exchange", "remove", "move"))
    if change in ("swap", "exchange"):
        if len(things) < 2:
            return None
        j = rng.choice([k for k in range(len(things)) if k != i])
        other = things[j]
        if change == "swap":
            things[i] = replace(thing, cx=other.cx, cy=other.cy)
            things[j] = replace(other, cx=thing.cx, cy=thing.cy)
        elif isinstance(thing, Sign) or isinstance(other, Sign) or thing.colour == other.colour:
            return None
        else:
            things[i] = replace(thing, colour=other.colour, rgb=other.rgb)
            things[j] = replace(other, colour=thing.colour, rgb=thing.rgb)
    elif change == "remove":
        del things[i]
    elif change == "move":
        boxes = [other.box for other in things if other is not thing]
        spot = find_spot(rng, thing.extent, boxes, scene.width, scene.height)
        if spot is None or max(abs(spot[0] - thing.cx), abs(spot[1] - thing.cy)) < 0.3 * scene.short_side:
            return None
        things[i] = replace(thing, cx=spot[0], cy=spot[1])
    elif isinstance(thing, Sign):
        things[i] = replace(thing, text=sample_text(rng))
    else:
        things[i] = _alter(thing, change, rng, scene.short_side)
    return replace(scene, seed=rng.getrandbits(32), objects=tuple(things)) if things else None


def _alter(thing, change, rng, short_side):
    """The object with another colour, shape or size, its centre kept."""
    colour, shape, size = thing.colour, thing.shape, thing.size
    if change == "colour":
        colour = rng.choice([name for name in COLOURS if name != colour])
    elif change == "shape":
        shape = rng.choice([name for name in SHAPES if name != shape])
    else:
        size = "large" if size == "small" else "small"
    fresh = new_object(rng, colour, shape, size)
    side = round(rng.uniform(*SIZES[size]) * short_side, 2) if change == "size" else thing.side
    if change != "shape":
        fresh = replace(fresh, rotation=thing.rotation, style=thing.style)
    if change != "colour":
        fresh = replace(fresh, rgb=thing.rgb)
    return replace(fresh, cx=thing.cx, cy=thing.cy, side=side)
