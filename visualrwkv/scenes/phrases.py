"""The words of the drawn world in English and Chinese.

Every tuple of phrasings begins with the usual one; the others are further ways to ask the same.
Slots: ``{a}`` and ``{b}`` are names of objects, ``{an}`` a name with its article, ``{p}`` a plural,
``{where}`` a direction, ``{t}`` "number" or "letter".
"""

from visualrwkv.scenes.world import COLOURS, SHAPES, SIZES

LANGUAGES = {"en": 3, "zh": 1}  # how often each is spoken
SHORT_LINE = "Answer the question using a single word or phrase."
CHOICE_LINES = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接回答选项字母。",
}
LETTERS = "ABCDE"

_ENGLISH = {word: word for word in (*COLOURS, *SHAPES, *SIZES)}
_CHINESE = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "pink": "粉色",
    "brown": "棕色",
    "gray": "灰色",
    "cyan": "青色",
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "diamond": "菱形",
    "cross": "十字形",
    "ring": "圆环",
    "hexagon": "六边形",
    "small": "小",
    "large": "大",
}
WORDS = {"en": _ENGLISH, "zh": _CHINESE}
# Other words for the same, understood in questions and never used in answers.
ALIASES = {
    "en": {"large": ("big",), "gray": ("grey",)},
    "zh": {
        "circle": ("圆",),
        "square": ("方形",),
        "star": ("星形", "星星"),
        "cross": ("十字",),
        "ring": ("环形",),
        "orange": ("橘色",),
        "pink": ("粉红色",),
        "brown": ("褐色",),
    },
}
YES_NO = {
    "en": {
        ("existence", True): "yes",
        ("existence", False): "no",
        ("relation", True): "yes",
        ("relation", False): "no",
    },
    "zh": {
        ("existence", True): "有",
        ("existence", False): "没有",
        ("relation", True): "是",
        ("relation", False): "不是",
    },
}
SIGN_NAME = {"en": "sign", "zh": "牌子"}
TEXT_KIND = {"en": {True: "number", False: "letter"}, "zh": {True: "数字", False: "字母"}}
DIRECTIONS = {
    "en": {
        "left": ("to the left of", "left of", "on the left side of"),
        "right": ("to the right of", "right of", "on the right side of"),
        "above": ("above", "higher than", "over"),
        "below": ("below", "lower than", "under"),
    },
    "zh": {
        "left": ("左边", "左侧", "左面"),
        "right": ("右边", "右侧", "右面"),
        "above": ("上面", "上方", "上边"),
        "below": ("下面", "下方", "下边"),
    },
}
DIRECTION_WORDS = {
    "en": {where: where for where in ("left", "right", "above", "below")},
    "zh": {where: usual for where, (usual, *_) in DIRECTIONS["zh"].items()},
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

PHRASES = {
    "en": {
        "colour": (
            "What color is the {a}?",
            "What is the color of the {a}?",
            "Which color is the {a}?",
            "What color does the {a} have?",
            "What colour is the {a}?",
            "Tell me the color of the {a}.",
        ),
        "shape": (
            "What shape is the {a} object?",
            "What is the shape of the {a} object?",
            "Which shape is the {a} object?",
            "What shape does the {a} object have?",
            "What shape is the {a} one?",
            "What shape is the object that is {a}?",
        ),
        "existence": (
            "Is there {an}?",
            "Is there {an} in the image?",
            "Is there {an} in the picture?",
            "Can you see {an}?",
            "Do you see {an} in the image?",
            "Does the image contain {an}?",
            "Does the picture show {an}?",
        ),
        "count": (
            "How many {p} are there?",
            "How many {p} are in the image?",
            "How many {p} are there in the picture?",
            "How many {p} can you see?",
            "How many {p} do you see in the image?",
            "What is the number of {p}?",
            "Count the {p}.",
        ),
        "relation": (
            "Is the {a} {where} the {b}?",
            "In the image, is the {a} {where} the {b}?",
            "Is the {a} located {where} the {b}?",
            "Can you see the {a} {where} the {b}?",
        ),
        "place": (
            "Where is the {a}?",
            "Where in the image is the {a}?",
            "Where do you see the {a}?",
        ),
        "seen_from": (
            "Where is the {a}, seen from the {b}?",
            "Seen from the {b}, where is the {a}?",
            "Compared with the {b}, where is the {a}?",
        ),
        "neighbour": (
            "What is {where} the {a}?",
            "What object is {where} the {a}?",
            "Which object is {where} the {a}?",
            "What can you see {where} the {a}?",
            "Name the object {where} the {a}.",
        ),
        "larger": (
            "Which is larger, the {a} or the {b}?",
            "Which is bigger, the {a} or the {b}?",
            "Which one is larger, the {a} or the {b}?",
            "Which object is larger: the {a} or the {b}?",
            "What is larger, the {a} or the {b}?",
        ),
        "smaller": (
            "Which is smaller, the {a} or the {b}?",
            "Which one is smaller, the {a} or the {b}?",
            "Which object is smaller: the {a} or the {b}?",
        ),
        "read": (
            "What {t} is on the sign?",
            "What {t} does the sign show?",
            "Which {t} is on the sign?",
            "What {t} is written on the sign?",
            "Read the {t} on the sign.",
            "What is written on the sign?",
            "What does the sign say?",
        ),
        "describe": (
            "Describe the image.",
            "Describe this image.",
            "Describe the picture.",
            "Please describe the image.",
            "What is in the image?",
            "What do you see in the picture?",
            "Give a description of the image.",
        ),
    },
    "zh": {
        "colour": (
            "{a}是什么颜色的？",
            "{a}是什么颜色？",
            "{a}的颜色是什么？",
            "图中的{a}是什么颜色的？",
            "{a}是哪种颜色？",
        ),
        "shape": (
            "{a}的物体是什么形状？",
            "{a}的物体是什么形状的？",
            "{a}的物体的形状是什么？",
            "图中{a}的物体是什么形状？",
            "{a}的东西是什么形状？",
        ),
        "existence": (
            "图中有{a}吗？",
            "图片中有{a}吗？",
            "图里有没有{a}？",
            "图中是否有{a}？",
            "有{a}吗？",
        ),
        "count": (
            "图中有几个{p}？",
            "图中有多少个{p}？",
            "图片里有几个{p}？",
            "一共有几个{p}？",
            "有几个{p}？",
        ),
        "relation": (
            "{a}在{b}的{where}吗？",
            "图中{a}在{b}的{where}吗？",
            "{a}是不是在{b}的{where}？",
            "{a}是在{b}{where}吗？",
        ),
        "place": (
            "{a}在图中的哪里？",
            "{a}在哪里？",
        ),
        "seen_from": (
            "{a}在{b}的哪里？",
            "相对于{b}，{a}在哪里？",
        ),
        "neighbour": (
            "{a}的{where}是什么？",
            "{a}{where}是什么？",
            "在{a}{where}的是什么？",
            "{a}的{where}是哪个物体？",
            "{a}的{where}有什么？",
        ),
        "larger": (
            "{a}和{b}哪个更大？",
            "{a}和{b}哪个大？",
            "{a}和{b}相比，哪个更大？",
            "哪个更大，{a}还是{b}？",
        ),
        "smaller": (
            "{a}和{b}哪个更小？",
            "{a}和{b}哪个小？",
            "哪个更小，{a}还是{b}？",
        ),
        "read": (
            "牌子上写的是什么？",
            "牌子上写着什么？",
            "牌子上是什么？",
            "牌子上的{t}是什么？",
            "牌子上写的是什么{t}？",
        ),
        "describe": (
            "描述这张图片。",
            "请描述这张图片。",
            "描述一下这张图片。",
            "这张图片里有什么？",
            "图中有什么？",
        ),
    },
}


def article(name):
    """The name with "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(shape):
    """The English plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def object_name(language, colour, shape, size=None, word=None):
    """ "small red circle" or "小的红色的圆形"; without ``size`` the first word is left out.

    ``word`` maps (language, word) to what is written; the default knows the usual words only.
    """
    word = word or usual_word
    parts = [word(language, part) for part in (size, colour, shape) if part is not None]
    return " ".join(parts) if language == "en" else "的".join(parts)


def usual_word(language, word):
    """The word that answers use for a colour, shape or size."""
    return WORDS[language][word]
