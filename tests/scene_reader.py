"""An independent reader of questions about drawn scenes: it works out the answer from the objects alone."""

import re

from visualrwkv.scenes import phrases

CANONICAL = {
    word: original
    for language in ("en", "zh")
    for original, said in phrases.WORDS[language].items()
    for word in (said, *phrases.ALIASES[language].get(original, ()))
}
DIRECTIONS = {
    said: where for options in phrases.DIRECTIONS.values() for where, words in options.items() for said in words
}


def matching(scene, name):
    """The objects that a name such as "large circle" or "小的红色的圆形" fits; the sign for "sign"."""
    if name in ("sign", "牌子"):
        return [scene.sign]
    words = [CANONICAL[word] for word in (name.split(" ") if name.isascii() else name.split("的"))]
    return [thing for thing in scene.shapes if all(word in (thing.size, thing.colour, thing.shape) for word in words)]


def the(scene, name):
    found = matching(scene, name)
    assert len(found) == 1, f"{name} is ambiguous"
    return found[0]


def side(scene, a, b):
    """Directions in which a lies from b, by the rule of the world."""
    dx, dy = a.cx - b.cx, a.cy - b.cy
    found = set()
    if abs(dx) >= 0.15 * min(scene.width, scene.height) and abs(dx) > abs(dy):
        found.add("left" if dx < 0 else "right")
    if abs(dy) >= 0.15 * min(scene.width, scene.height) and abs(dy) > abs(dx):
        found.add("above" if dy < 0 else "below")
    return found


def parse(question):
    """(phrase, slots) of a wording."""
    text = question.text.replace("\nAnswer the question using a single word or phrase.", "").split("\n")[0]
    fits = []
    for phrase, templates in phrases.PHRASES[question.language].items():
        kind = "compare" if phrase in ("larger", "smaller") else phrase
        for template in templates:
            if kind != (question.base or question.kind):
                continue
            pattern = re.escape(template)
            pattern = re.sub(r"\\\{(a|b|an|p|t)\\\}", r"(?P<\1>.+?)", pattern)
            pattern = pattern.replace(re.escape("{where}"), f"(?P<where>{'|'.join(sorted(DIRECTIONS, key=len)[::-1])})")
            match = re.fullmatch(pattern, text)
            if match:
                fits.append((phrase, match.groupdict()))
    for phrase, slots in fits:
        names = [slots[slot] for slot in ("a", "b") if slot in slots]
        names += [slots["an"].split(" ", 1)[1]] if "an" in slots else []
        words = [word for name in names for word in (name.split(" ") if name.isascii() else name.split("的"))]
        short = len(slots.get("p", "").split(" ")) <= 2 and slots.get("t", "number") in (
            "number",
            "letter",
            "数字",
            "字母",
        )
        if short and all(word in CANONICAL or word in ("sign", "牌子") for word in words):
            return phrase, slots
    raise AssertionError(f"no reading of {question.text!r}")


def expected(scene, question):
    """The answer, worked out from the objects alone."""
    phrase, slots = parse(question)
    chinese = question.language == "zh"
    words = phrases.WORDS[question.language]

    def name(thing):
        colour, shape = words[thing.colour], words[thing.shape]
        return f"{colour}的{shape}" if chinese else f"{colour} {shape}"

    if phrase in ("colour", "shape"):
        return words[getattr(the(scene, slots["a"]), phrase)]
    if phrase == "existence":
        found = bool(matching(scene, slots["a"] if "a" in slots else slots["an"].split(" ", 1)[1]))
        return {True: "有", False: "没有"}[found] if chinese else {True: "yes", False: "no"}[found]
    if phrase == "count":
        counted = slots["p"]
        if counted in ("objects", "物体"):
            return str(len(scene.objects))
        if chinese:
            counted = counted.removesuffix("的物体")
        elif counted.endswith(" objects"):
            counted = counted.removesuffix(" objects")
        else:
            counted = counted.removesuffix("es") if counted == "crosses" else counted.removesuffix("s")
        return str(len(matching(scene, counted)))
    if phrase == "relation":
        a, b = the(scene, slots["a"]), the(scene, slots["b"])
        found = side(scene, a, b)
        where = DIRECTIONS[slots["where"]]
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[where]
        assert found and found <= {where, opposite}, "asked only along the axis that tells"
        return {True: "是", False: "不是"}[where in found] if chinese else {True: "yes", False: "no"}[where in found]
    if phrase == "neighbour":
        a, where = the(scene, slots["a"]), DIRECTIONS[slots["where"]]
        before = {"left": lambda t: t.cx < a.cx, "right": lambda t: t.cx > a.cx}
        before |= {"above": lambda t: t.cy < a.cy, "below": lambda t: t.cy > a.cy}
        found = [thing for thing in scene.objects if thing is not a and before[where](thing)]
        assert len(found) == 1 and side(scene, found[0], a) == {where}
        assert the(scene, name(found[0])) is found[0]
        return name(found[0])
    if phrase in ("larger", "smaller"):
        pair = [the(scene, slots["a"]), the(scene, slots["b"])]
        pair.sort(key=lambda thing: thing.side)
        assert pair[1].side > 1.4 * pair[0].side
        return name(pair[phrase == "larger"])
    assert phrase == "read"
    if slots.get("t"):
        assert (
            slots["t"] == {"en": ("letter", "number"), "zh": ("字母", "数字")}[question.language][scene.sign.is_number]
        )
    return scene.sign.text
