"""The loop that writes replies: it writes what generate does; replies join and leave without touching each other."""

import pytest
import torch

import visualrwkv
from visualrwkv import InputError
from visualrwkv.decoding import Decoder, Reply
from visualrwkv.prompt import Turn
from visualrwkv.sampling import Sampling
from visualrwkv.streaming import ReplyText, StopAtTurnEnd

QUESTIONS = ["What is the colour?", "What?", "What is it, 在哪里?", "How many objects do you see in the picture?"]


def prompts(vlm, pictures, questions):
    """A batch of questions, the first ones about one picture each."""
    groups = [pictures[n : n + 1] for n in range(len(questions))]
    turns = [[Turn("user", text, images=len(own))] for text, own in zip(questions, groups, strict=True)]
    return vlm.processor.prepare(groups, turns)


def reply(vlm, **sampling):
    return Reply(vlm.processor.tokenizer, Sampling(**sampling))


@pytest.mark.parametrize("count", [1, 4])
def test_writes_what_generate_writes(vlm, pictures, count):
    inputs = prompts(vlm, pictures[:3], QUESTIONS[:count])  # the last question has no picture
    tokenizer, length = vlm.processor.tokenizer, inputs["input_ids"].shape[1]
    sequences = vlm.model.generate(
        **inputs,
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=0,
        stopping_criteria=[StopAtTurnEnd(tokenizer, length)],
    )
    expected = [ReplyText.whole(tokenizer, ids) for ids in sequences[:, length:].tolist()]
    assert vlm.answers(inputs, Sampling(max_new_tokens=24)) == expected
    assert all(expected)


def test_replies_join_and_leave_at_any_token(vlm, pictures):
    decoder, lengths = Decoder(vlm.model), [9, 2, 14, 5]
    replies, rows = [reply(vlm, max_new_tokens=length) for length in lengths], []
    for n, one in enumerate(replies):  # one more joins behind each token of the others
        decoder.read([one], prompts(vlm, pictures[n : n + 1], QUESTIONS[n : n + 1]))
        rows.append(len(decoder.advance()))
    while decoder.advance():
        rows.append(len(decoder.replies))
    assert max(rows) > 2 and rows[-1] == 1
    assert [one.text for one in replies] == [
        vlm.ask(picture, question, max_new_tokens=length)
        for picture, question, length in zip(pictures, QUESTIONS, lengths, strict=False)
    ]
    assert decoder.state is None and decoder.replies == []


def test_the_state_has_read_all_but_the_last_token(vlm, pictures):
    inputs, one, decoder = prompts(vlm, pictures, QUESTIONS[:1]), reply(vlm, max_new_tokens=7), Decoder(vlm.model)
    pieces = list(decoder.stream(one, inputs))
    assert "".join(pieces) == one.text and one.finish in ("stop", "length")
    ids = torch.cat([inputs["input_ids"], torch.tensor([one.tokens[:-1]])], 1)
    with torch.no_grad():
        whole = vlm.model(ids, pixel_values=inputs["pixel_values"]).cache
    assert decoder.state.seen == whole.seen == ids.shape[1]
    for ours, expected in zip(decoder.state.layers, whole.layers, strict=True):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_reply_that_cannot_be_read_leaves_the_others_alone(vlm, pictures):
    decoder, one = Decoder(vlm.model), reply(vlm, max_new_tokens=8)
    decoder.read([one], prompts(vlm, pictures, QUESTIONS[:1]))
    inputs = prompts(vlm, pictures[1:], QUESTIONS[1:2])
    with pytest.raises(InputError, match="places for 1 images"):
        decoder.read([reply(vlm)], {name: value for name, value in inputs.items() if name != "pixel_values"})
    failing = reply(vlm, temperature=1.0)
    failing.choose = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        decoder.read([failing], prompts(vlm, pictures, QUESTIONS[:1]))
    while decoder.advance():
        pass
    assert one.text == vlm.ask(pictures[0], QUESTIONS[0], max_new_tokens=8)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "presence_penalty": 0.5}])
def test_scores_that_are_no_numbers_end_their_reply_alone(random_folder, pictures, sampling):
    """As in float16, where a state may leave its range, at once or within a reply."""
    vlm = visualrwkv.load(random_folder)
    wanted = vlm.ask(pictures[:3], QUESTIONS[:3], max_new_tokens=8, **sampling)
    decoder, replies = Decoder(vlm.model), [reply(vlm, max_new_tokens=8, **sampling) for _ in QUESTIONS[:3]]
    inputs = prompts(vlm, pictures[:3], QUESTIONS[:3])
    inputs["pixel_values"][0] *= torch.nan
    texts = decoder.read(replies, inputs)
    assert texts[0] == "" and decoder.advance()
    assert decoder.replies == replies[1:]
    decoder.state.layers[-1].wkv[0] *= torch.nan
    while decoder.advance():
        pass
    for broken in replies[:2]:
        with pytest.raises(InputError, match="NaN.*float32"):
            broken.check()
    replies[2].check()
    assert replies[2].text == wanted[2] and wanted[1].startswith(replies[1].text)


def test_the_place_of_a_picture_is_never_written(random_folder, pictures):
    vlm = visualrwkv.load(random_folder)
    place, head = vlm.model.config.image_token_id, vlm.model.rwkv.head.weight
    inputs, written = prompts(vlm, pictures, QUESTIONS[:1]), []
    for sign in (-1, 1):  # with one of them it has the highest score of all tokens
        with torch.no_grad():
            head[place] = sign * 100 * head.abs().max()
            likeliest = vlm.model(**inputs).logits[0, -1].argmax()
        one = reply(vlm, max_new_tokens=3)
        list(Decoder(vlm.model).stream(one, inputs))
        written.append((int(likeliest) == place, place in one.tokens))
    assert sorted(written) == [(False, False), (True, False)]
