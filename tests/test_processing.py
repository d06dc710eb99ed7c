"""The processor: ids, labels, batches, chat messages, files, and the transformers pipeline."""

import base64
import logging

import pytest
import torch
from PIL import Image

from visualrwkv import RWKVWorldTokenizer, VisualRWKVImageProcessor, VisualRWKVProcessor
from visualrwkv.errors import InputError
from visualrwkv.prompt import Turn

RED, BLUE = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
L = 5


@pytest.fixture(scope="module")
def processor():
    return VisualRWKVProcessor(VisualRWKVImageProcessor(size=28), RWKVWorldTokenizer(), num_image_tokens=L)


def question(text, image=None):
    parts = [{"type": "text", "text": text}]
    return {"role": "user", "content": parts if image is None else [{"type": "image", "image": image}, *parts]}


def test_placeholders_are_repeated_and_only_replies_are_learned(processor):
    ids, labels = processor.encode_turns([Turn("user", "Colour?", 1), Turn("assistant", "Red")])
    assert ids.count(processor.image_token_id) == L
    learned = [index for index, label in zip(ids, labels, strict=True) if label != -100]
    assert processor.tokenizer.decode(learned) == " Red\n\n"
    assert all(label in (-100, index) for index, label in zip(ids, labels, strict=True))


def test_pictures_are_never_learned(processor):
    ids, labels = processor.encode_turns([Turn("user", "Draw."), Turn("assistant", "Here:", 1)])
    assert processor.image_token_id in ids and processor.image_token_id not in labels


def test_the_label_mask_fits_other_vocabularies(tmp_path):
    from visualrwkv.tokenization import write_vocabulary

    words = [b"Assistant:", b"Assist", b"ant: R", b"\n\n"]
    for count in range(len(words) + 1):
        path = tmp_path / f"{count}.txt"
        write_vocabulary([bytes([i]) for i in range(256)] + words[len(words) - count :], path)
        small = VisualRWKVProcessor(VisualRWKVImageProcessor(size=28), RWKVWorldTokenizer(path), L)
        ids, labels = small.encode_turns([Turn("assistant", "Red")])
        learned = small.tokenizer.decode_bytes([label for label in labels if label != -100])
        # a token that holds the end of the label and the start of the reply is given, not learned
        assert learned in (b" Red\n\n", b"ed\n\n")
        assert small.image_token_id == 257 + count


def test_prepare_pads_on_the_left_and_a_row_is_what_it_is_alone(processor):
    turns = [[Turn("user", "What is it?", 1)], [Turn("user", "Hi")], [Turn("user", "Same?", 2)]]
    images = [[RED], [], [RED, BLUE]]
    batch = processor.prepare(images, turns)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert batch["pixel_values"][0].equal(batch["pixel_values"][1])
    for row in range(3):
        single = processor.prepare([images[row]], [turns[row]])
        n = single["input_ids"].shape[1]
        assert batch["input_ids"][row, -n:].equal(single["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - n) + [1] * n
        assert not batch["input_ids"][row, :-n].any()
    assert "pixel_values" not in processor.prepare(None, [[Turn("user", "Hi")]])
    assert processor.prepare([RED], turns[:1])["input_ids"].dtype == torch.long


def test_prepare_names_wrong_counts(processor):
    with pytest.raises(InputError, match="conversation 2 shows 1 images, but 0 were passed"):
        processor.prepare([[RED], []], [[Turn("user", "a", 1)], [Turn("user", "b", 1)]])
    with pytest.raises(InputError, match="1 lists of images for 2 conversations"):
        processor.prepare([[RED]], [[Turn("user", "a", 1)], [Turn("user", "b", 1)]])


def test_call_takes_prompt_strings_as_they_are(processor):
    text = "User: <image>\nWhat?\n\nAssistant:"
    batch = processor(images=RED, text=text, return_tensors="pt")
    assert batch["input_ids"][0].tolist().count(65535) == L
    assert batch["input_ids"].equal(
        VisualRWKVProcessor(processor.image_processor, processor.tokenizer, L, "first").prepare(
            [[RED]], [[Turn("user", "What?", 1)]]
        )["input_ids"]
    )
    two = processor(images=[[RED], [BLUE, RED]], text=["<image>", "a <image> b <image>"], return_tensors="pt")
    assert two["input_ids"].shape[0] == 2 and two["pixel_values"].shape[0] == 3
    assert two["attention_mask"][0].sum() == L
    ragged = processor(text=["a", "the cat sat"], padding=False)
    assert [len(row) for row in ragged["input_ids"]] == [1, 3]
    assert set(processor(images=RED)) == {"pixel_values"}
    assert isinstance(processor(text="a")["input_ids"], list)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": RED, "text": "What?"}, "holds 0 <image> markers, but 1 images were passed"),
        ({"text": "<image>"}, "holds 1 <image> markers, but 0 images"),
        ({"images": [[RED, RED], []], "text": ["<image>", "<image>"]}, r"\[1, 1\] .* \[2, 0\] images"),
        ({}, "neither images nor text"),
        ({"text": [1]}, "text must be a string"),
        ({"text": "a", "padding": "max_length"}, "padding='max_length'"),
        ({"images": "missing.png", "text": "<image>"}, "missing.png: no such file"),
    ],
)
def test_wrong_calls_are_one_line_errors(processor, options, message):
    with pytest.raises(InputError, match=message) as error:
        processor(**options)
    assert "\n" not in str(error.value)


def test_unknown_arguments_are_refused(processor):
    with pytest.raises(TypeError, match="truncation"):
        processor(text="a", truncation=True)
    with pytest.raises(TypeError, match="tools"):
        processor.apply_chat_template([question("a")], tools=[{}])
    with pytest.raises(TypeError, match="max_length"):
        processor.apply_chat_template([question("a")], tokenize=True, processor_kwargs={"max_length": 3})
    with pytest.raises(InputError, match="prompt 'middle'"):
        VisualRWKVProcessor(processor.image_processor, processor.tokenizer, L, "middle")
    with pytest.raises(InputError, match="num_image_tokens 0"):
        VisualRWKVProcessor(processor.image_processor, processor.tokenizer, 0)


def test_chat_messages_go_through_the_prompt_builder(processor):
    chat = [question("What is it?", RED)]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "User: What is it?\n<image>\nWhat is it?\n\nAssistant:"
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chat, **options)
    expected = processor.prepare([[RED]], [[Turn("user", "What is it?", 1)]])
    assert set(batch) == set(expected)
    assert all(batch[key].equal(expected[key]) for key in expected)
    ids = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    assert ids == expected["input_ids"][0].tolist()
    chats = [chat, [question("Hi")]]
    assert processor.apply_chat_template(chats, **options)["input_ids"].shape[0] == 2
    assert len(processor.apply_chat_template(chats)) == 2


def test_pictures_in_messages_as_transformers_writes_them(processor, tmp_path):
    """Among them base64 without a header, and the empty fields that a table of messages has."""
    RED.save(tmp_path / "red.png")
    data = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template([question("What?", RED)], **options)["pixel_values"]
    for part in (
        {"base64": data},
        {"base64": f"data:image/png;base64,{data}"},
        {"url": f"data:image/png;base64,{data}"},
        {"image": str(tmp_path / "red.png")},
        {"image": None, "path": str(tmp_path / "red.png"), "url": None, "text": None},
    ):
        content = [{"type": "image"} | part, {"type": "text", "text": "What?", "image": None}]
        batch = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        assert torch.equal(batch["pixel_values"], expected), part
    with pytest.raises(InputError, match="no such file|name too long") as caught:
        processor.apply_chat_template([question("What?", data * 100)], **options)
    assert len(str(caught.value)) < 300


def test_a_reply_can_be_continued(processor):
    chat = [question("Why?"), {"role": "assistant", "content": [{"type": "text", "text": "Because"}]}]
    assert processor.apply_chat_template(chat, continue_final_message=True).endswith("\n\nAssistant: Because")
    assert processor.apply_chat_template(chat).endswith("Assistant: Because\n\n")
    for wrong in ({"add_generation_prompt": True}, {"add_generation_prompt": True, "continue_final_message": True}):
        with pytest.raises(InputError, match="continue_final_message"):
            processor.apply_chat_template(chat, **wrong)
    with pytest.raises(InputError, match="continue_final_message"):
        processor.apply_chat_template(chat[:1], continue_final_message=True)


def test_typed_markers_never_become_pictures(processor):
    chat = [question("Is <image> a tag?", RED)]
    ids = processor.apply_chat_template(chat, tokenize=True)
    assert ids.count(processor.image_token_id) == L
    assert "Is <image> a tag?" in processor.tokenizer.decode(ids, skip_special_tokens=True)
    with pytest.raises(InputError, match="tokenize=True"):
        processor.apply_chat_template(chat)


def test_unusable_chats(processor):
    options = {"tokenize": True, "return_dict": True}
    with pytest.raises(InputError, match="announces an image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], **options)
    with pytest.raises(InputError, match="'system'"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}], **options)
    with pytest.raises(InputError, match="empty"):
        processor.apply_chat_template([])


def test_save_and_load(processor, tmp_path, caplog):
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    saved = VisualRWKVProcessor(processor.image_processor, processor.tokenizer, 17, "first")
    saved.save_pretrained(tmp_path)
    assert (tmp_path / "rwkv_vocab.txt").is_file()
    logging.getLogger("transformers").propagate = True  # so that a warning would be seen
    for cls in (VisualRWKVProcessor, AutoProcessor):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is VisualRWKVProcessor
        assert (again.num_image_tokens, again.prompt, again.image_token_id) == (17, "first", 65535)
        assert again.image_processor.to_dict() == saved.image_processor.to_dict()
        assert type(again.tokenizer) is RWKVWorldTokenizer
    assert VisualRWKVProcessor.from_pretrained(tmp_path, prompt="last").prompt == "last"
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is RWKVWorldTokenizer
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VisualRWKVImageProcessor
    assert not caplog.records


def test_generated_text_is_readable(processor):
    ids = [0, 0, *processor.tokenizer.encode_text("User: a"), 65535, *processor.tokenizer.encode_text("Red 😀\n\n")]
    assert processor.post_process_image_text_to_text(torch.tensor([ids])) == ["User: aRed 😀"]
    assert processor.post_process_image_text_to_text(torch.tensor([[98, 195]])) == ["a\ufffd"]
    assert processor.post_process_image_text_to_text([98, 261]) == "a"


def test_pipeline(random_folder, vlm):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(random_folder), device="cpu")
    chats = [[question("What is it?", RED)], [question("A longer question: what colour?", BLUE)]]
    options = {"max_new_tokens": 4, "return_full_text": False}
    alone = [pipe(text=chat, **options)[0]["generated_text"] for chat in chats]
    together = [result[0]["generated_text"] for result in pipe(text=chats, batch_size=2, **options)]
    assert alone == together
    for chat, image, text in zip(chats, (RED, BLUE), alone, strict=True):
        answer = vlm.ask(image, chat[0]["content"][1]["text"], max_new_tokens=4)
        assert text.split("\n\n")[0].strip() == answer
    direct = pipe(images=RED, text="User: <image>\nWhat?\n\nAssistant:", **options)
    assert isinstance(direct[0]["generated_text"], str)
    whole = pipe(text=chats[0], max_new_tokens=4)[0]["generated_text"]
    assert whole[-1]["role"] == "assistant"
