"""The prompt builder against the public code's prompts, and the rules for pictures and messages."""

import json
from itertools import pairwise

import pytest
from golden_data import GOLDEN

from visualrwkv.errors import InputError
from visualrwkv.image_processing import VisualRWKVImageProcessor
from visualrwkv.processing import VisualRWKVProcessor
from visualrwkv.prompt import (
    IMAGE,
    Segment,
    Turn,
    build_prompt,
    check_question,
    split_markers,
    turns_from_llava,
    turns_from_messages,
    upper_slice,
)
from visualrwkv.tokenization import RWKVWorldTokenizer

PROMPTS = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))
POSITIONS = {"middle": "sandwich", "first": "first", "last": "last", "none": "sandwich"}
RUNS = [
    pytest.param(case, position, id=f"{case['id']}-{position}")
    for case in PROMPTS["cases"]
    for position, result in case["results"].items()
    if "error" not in result
]


@pytest.fixture(scope="module")
def tokenizer():
    return RWKVWorldTokenizer()


def processor_for(tokenizer, position):
    return VisualRWKVProcessor(
        VisualRWKVImageProcessor(size=8), tokenizer, num_image_tokens=1, prompt=POSITIONS[position]
    )


def second_picture_in_a_later_turn(case, position):
    """The public model refuses such a sample. Ours puts a later picture between copies of its own turn's question."""
    turns = turns_from_llava(case["conversations"], int(case["has_image"]))
    return position == "middle" and sum(turn.images > 0 for turn in turns) > 1


@pytest.mark.parametrize(("case", "position"), RUNS)
def test_golden_prompts(case, position, tokenizer):
    expected = case["results"][position]
    if second_picture_in_a_later_turn(case, position):
        pytest.skip("deliberately different, see test_later_pictures_stand_between_their_own_question")
    turns = turns_from_llava(case["conversations"], int(case["has_image"]))
    segments = build_prompt(turns, POSITIONS[position])
    assert "".join(segment.text for segment in segments) == expected["input_text"]
    bodies = [segment.text.partition(":")[2].removeprefix(" ").removesuffix("\n\n") for segment in segments]
    assert bodies == expected["values"]
    assert sum(turn.images for turn in turns) == expected["num_image_tokens"]
    if "all_human" in expected:
        assert upper_slice(turns) == expected["all_human"]
    ids, labels = processor_for(tokenizer, position).encode_turns(turns)
    # placeholders are an id of the vocabulary here, and are never learned
    assert [-200 if index == 65535 else index for index in ids] == expected["input_ids"]
    if all(message["from"] in ("human", "gpt") for message in case["conversations"]):
        assert labels == [-100 if label == -200 else label for label in expected["labels"]]


def test_errors_of_the_public_code_are_one_line_errors():
    wrong = [case for case in PROMPTS["cases"] for result in case["results"].values() if "error" in result]
    assert wrong
    for case in wrong:
        with pytest.raises(InputError, match="must be 'human' or 'gpt'"):
            turns_from_llava(case["conversations"], 1)


def test_roles_count_in_any_case(tokenizer):
    """The public code reads "Human"/"GPT" as the roles but then learns the whole prompt; ours masks as usual."""
    loud = [{"from": "Human", "value": "<image>\nWhat is it?"}, {"from": "GPT", "value": "A cup."}]
    calm = [{"from": message["from"].lower(), "value": message["value"]} for message in loud]
    processor = processor_for(tokenizer, "middle")
    expected = processor.encode_turns(turns_from_llava(calm, 1))
    assert processor.encode_turns(turns_from_llava(loud, 1)) == expected
    assert -100 in expected[1] and expected[1][-1] == 261


def test_later_pictures_stand_between_their_own_question():
    turns = [
        Turn("user", "Is the kettle on?", 1),
        Turn("assistant", "Yes."),
        Turn("user", "And the oven?", 1),
        Turn("assistant", "No."),
    ]
    texts = [segment.text for segment in build_prompt(turns)]
    assert texts[0] == "User: Is the kettle on?\nAnd the oven?\n<image>\nIs the kettle on?\n\n"
    assert texts[2] == "User: And the oven?\n<image>\nAnd the oven?\n\n"


def test_a_chat_reads_only_new_turns_and_the_slice_holds_what_is_known_by_then():
    first = [Turn("user", "Hello"), Turn("assistant", "Hi.")]
    second = [*first, Turn("user", "What is this?", 1)]
    assert [s.text for s in build_prompt(second, open_reply=True, start=2)] == [
        "User: Hello\nWhat is this?\n<image>\nWhat is this?\n\n",
        "Assistant:",
    ]
    third = [*second, Turn("assistant", "A cat."), Turn("user", "And this?", 1)]
    assert build_prompt(third, open_reply=True, start=4)[0].text == "User: And this?\n<image>\nAnd this?\n\n"
    # the turns already read are left out, not changed
    assert build_prompt(third, "first", open_reply=True)[4:] == build_prompt(third, "first", open_reply=True, start=4)


@pytest.mark.parametrize("position", ["sandwich", "first", "last"])
@pytest.mark.parametrize("shown", [(1, 0, 0), (1, 1, 0), (0, 2, 1), (0, 0, 0)])
def test_without_foresight_a_conversation_is_written_as_it_is_held(position, shown):
    turns = []
    for number, images in enumerate(shown):
        turns += [Turn("user", f"Question {number}?", images), Turn("assistant", f"Answer {number}.")]
    held = [
        segment
        for start in range(0, len(turns), 2)
        for segment in build_prompt(turns[: start + 2], position, start=start)
    ]
    assert build_prompt(turns, position, foresight=False) == held
    # foresight shows in a sandwich, when questions follow the first picture
    assert (build_prompt(turns, position) == held) == (position != "sandwich" or not any(shown))


@pytest.mark.parametrize(
    ("position", "text"),
    [
        ("sandwich", "User: Same?\n<image>\n<image>\nSame?\n\n"),
        ("first", "User: <image>\n<image>\nSame?\n\n"),
        ("last", "User: Same?\n<image>\n<image>\n\n"),
    ],
)
def test_several_pictures_each_on_its_own_line(position, text):
    (segment,) = build_prompt([Turn("user", "Same?", 2)], position)
    assert segment.text == text
    assert segment.pieces.count(IMAGE) == 2
    assert all(isinstance(a, str) != isinstance(b, str) for a, b in pairwise(segment.pieces))


def test_open_replies():
    question = [Turn("user", "Why?")]
    assert build_prompt(question, open_reply=True)[-1] == Segment(("Assistant:",), True)
    begun = [*question, Turn("assistant", "Because ")]
    assert build_prompt(begun, open_reply=True)[-1] == Segment(("Assistant: Because",), True)
    assert build_prompt(begun)[-1] == Segment(("Assistant: Because\n\n",), True)
    assert build_prompt([*question, Turn("assistant", "")], open_reply=True)[-1] == Segment(("Assistant:",), True)
    assert build_prompt([], open_reply=True) == [Segment(("Assistant:",), True)]


def test_what_users_type_is_never_a_picture():
    segments = build_prompt([Turn("user", "What does <image> mean?", 1)])
    assert segments[0].pieces == ("User: What does <image> mean?\n", IMAGE, "\nWhat does <image> mean?\n\n")


def test_llava_markers():
    def images(value, n):
        return [turn.images for turn in turns_from_llava([{"from": "human", "value": value}], n)]

    assert images("<image>\n<image>\nQ", 1) == [1]
    assert images("<image>\n<image>\nQ", 2) == [2]
    assert images("<image> is a tag", 0) == [0]
    assert turns_from_llava([{"from": "human", "value": "a <image> tag"}], 0)[0].text == "a <image> tag"


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"from": "tool", "value": "x"}], "turn 1 comes from 'tool'"),
        ([{"from": "human"}], "turn 1 is not an object"),
        ([{"from": "human", "value": "x"}, "gpt"], "turn 2 is not an object"),
        ([{"from": "human", "value": 3}], "turn 1 is not an object"),
        ([{"value": "x"}], "turn 1 is not an object"),
    ],
)
def test_unusable_llava_turns(conversation, message):
    with pytest.raises(InputError, match=message):
        turns_from_llava(conversation, 0)


def test_messages():
    picture = object()
    turns, images = turns_from_messages(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture}, {"type": "text", "text": "One."}, {"type": "image"}],
            },
            {"role": "assistant", "content": "Yes."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Two."},
                    {"type": "image_url", "image_url": {"url": "data:,"}},
                    {"type": "text", "text": "Three."},
                    {"type": "image", "path": "a.png"},
                ],
            },
        ]
    )
    assert turns == [Turn("user", "One.", 2), Turn("assistant", "Yes."), Turn("user", "Two.\nThree.", 2)]
    assert images == [picture, None, "data:,", "a.png"]


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "system", "content": "Be brief."}, "no place for the role 'system'"),
        ({"role": "tool", "content": "x"}, "role 'tool'; must be"),
        ({"role": "user"}, "has no content"),
        ({"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, "type 'video'"),
        ({"role": "user", "content": [{"type": "text"}]}, "type 'text'"),
        ({"role": "user", "content": ["x"]}, "type 'str'"),
        ("hello", "not an object"),
    ],
)
def test_unusable_messages(message, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        turns_from_messages([message])
    assert "\n" not in str(error.value)


def test_questions_positions_and_speakers_are_checked():
    assert check_question("Why?") == "Why?"
    for question, complaint in ((" \n", "empty"), ("what <image>", "'<image>'"), (None, "NoneType")):
        with pytest.raises(InputError, match=complaint):
            check_question(question)
    with pytest.raises(InputError, match="'middle' is unknown; choose one of sandwich, first, last"):
        build_prompt([], "middle")
    with pytest.raises(InputError, match="unknown speaker 'human'"):
        Turn("human", "x")
    with pytest.raises(InputError, match="must be a string, got int"):
        Turn("user", 3)


def test_markers_in_prompt_strings():
    assert split_markers("a<image>\nb<image><image>") == ["a", IMAGE, "\nb", IMAGE, IMAGE]
    assert split_markers("") == []
