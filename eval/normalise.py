"""The normalisers of all scorers, each as its reference defines it, accidents included.

`punctuation` (P), `words` (D) and `evalai` (E) are the steps of the official VQA evaluator and of the M4C/EvalAI
processor; `evaluation.md` of the benchmarks and tests/golden/eval pin them.
"""

import re
from functools import cache, lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ANY_MARK = re.compile("[" + re.escape(_PUNCTUATION + ".") + "]")
_NUMBER_COMMA = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_STOPS_REMOVED = 32  # the official code passes its regex flags as the count
_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
        strict=True,
    )
)


def _contractions():
    """Words whose apostrophe is missing or misplaced -> the official spelling."""
    table = {}
    endings = {
        "'t": "aint arent cant couldnt didnt doesnt dont hadnt hasnt havent isnt mightnt mustnt neednt oughtnt shant "
        "shouldnt wasnt werent wont wouldnt",
        "'s": "hes hows somebodys someones thats theres whats whens wheres whos whys",
        "'d": "hed howd itd someoned somethingd thered theyd whered whod youd",
        "'ll": "howll itll somebodyll someonell somethingll theyll whatll wholl whyll youll",
        "'re": "therere theyre whatre whyre youre",
        "'ve": "couldve mightve mustve notve shouldve theyve weve whatve whereve whove wouldve youve",
    }
    for ending, known in endings.items():
        letters = ending[1:]
        table |= {word: word.removesuffix(letters) + ending for word in known.split()}
    for word in "could had might should would".split():
        table |= dict.fromkeys((f"{word}nt've", f"{word}n'tve"), f"{word}n't've")
    for word in "he it she somebody someone something there they we who you".split():
        table |= dict.fromkeys((f"{word}d've", f"{word}'dve"), f"{word}'d've")
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    return table | {
        "maam": "ma'am",
        "oclock": "o'clock",
        "twas": "'twas",
        "yall": "y'all",
        "somebody'd": "somebodyd",  # sic
    }


CONTRACTIONS = _contractions()
_STRAIGHT = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}
# The public VizWiz evaluator was saved with typographic apostrophes in most of its replacements.
VIZWIZ_CONTRACTIONS = {
    word: right if right in _STRAIGHT else right.replace("'", "’") for word, right in CONTRACTIONS.items()
}


@lru_cache(maxsize=1 << 18)
def spaces(text):
    """Line breaks and tabs as spaces, ends stripped: what the VQA evaluators do to every answer."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)
def punctuation(text):
    """The punctuation step P: a mark beside a space goes, others become spaces; full stops go but before digits."""
    if not _ANY_MARK.search(text):
        return text
    number = _NUMBER_COMMA.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        if mark in text:
            beside_space = number or mark + " " in text or " " + mark in text
            result = result.replace(mark, "" if beside_space else " ")
    return _STOP.sub("", result, count=_STOPS_REMOVED)


def words(text, contractions=CONTRACTIONS):
    """The digit and article step D: lower case, number words as digits, no articles, official contractions."""
    kept = (_NUMBERS.get(word, word) for word in text.lower().split() if word not in _ARTICLES)
    return " ".join([contractions.get(word, word) for word in kept])


@lru_cache(maxsize=1 << 18)
def vqa(text):
    """P, then D."""
    return words(punctuation(text))


@lru_cache(maxsize=1 << 18)
def evalai(text):
    """E, the EvalAI/M4C processor: of TextVQA's scorer and of the VQA v2 and VizWiz uploads."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa(spaces(text))


@cache
def soft_accuracy(matches, references=10):
    """VQA accuracy: each annotator left out in turn, min(1, matches among the others / 3), averaged.

    With ten references 0, 1, 2, 3 and more matches give 0, 0.3, 0.6, 0.9 and 1.
    """
    with_one_less = matches * min(1.0, (matches - 1) / 3)
    return (with_one_less + (references - matches) * min(1.0, matches / 3)) / references


_BRACKETS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer is ([a-z])\b", re.IGNORECASE)


def option_letter(text, options):
    """The letter that a reply chooses by VLMEvalKit's exact matching, None if that is not clear.

    Args:
        text: the reply.
        options: {letter: text of the option}.
    """
    tokens = text.translate(_BRACKETS).split()
    named = [letter for letter in options if letter in tokens]
    if len(named) == 1 and tokens.index(named[0]) > len(tokens) - 5:
        return named[0]
    phrase = _ANSWER_IS.search(text)
    if phrase and phrase[1].upper() in options:
        return phrase[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    held = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return held[0] if len(held) == 1 else None
