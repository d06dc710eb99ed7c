"""How tokens are chosen, and how their ids become text."""

import random

import numpy as np
import pytest
import torch

from visualrwkv.errors import InputError
from visualrwkv.sampling import Sampling, TokenChoice
from visualrwkv.streaming import ReplyText

SCORES = torch.tensor([0.0, 1.0, 2.0, 3.0, 2.5, -torch.inf])


def draws(count=400, scores=SCORES, **options):
    """How often each token is chosen when each is the first of a reply."""
    choices = [int(TokenChoice(Sampling(seed=seed, **options))(scores)) for seed in range(count)]
    return torch.bincount(torch.tensor(choices), minlength=len(scores)) / count


def test_sampling_defaults_are_greedy():
    assert Sampling().max_new_tokens == 128
    assert Sampling().plain and Sampling(seed=3, top_p=0.5).plain
    assert not Sampling(temperature=0.1).plain and not Sampling(frequency_penalty=-1).plain


def test_numbers_of_numpy_are_numbers():
    ours = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), max_new_tokens=np.int32(5), seed=np.uint8(7))
    assert ours == Sampling(temperature=0.5, top_k=3, max_new_tokens=5, seed=7)
    for wrong in ({"top_k": np.float64(3)}, {"temperature": np.bool_(True)}, {"seed": 2**63}):
        with pytest.raises(InputError):
            Sampling(**wrong)
    with pytest.raises(InputError) as caught:
        Sampling(temperature="x" * 10**6)
    assert len(str(caught.value)) < 200


def test_temperature_follows_the_softmax():
    for temperature in (0.5, 1.0, 3.0):
        expected = (SCORES / temperature).softmax(0)
        assert torch.allclose(draws(1500, temperature=temperature), expected, atol=0.05)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 100])
def test_extreme_temperatures_choose_what_is_allowed(temperature):
    scores = SCORES * 1e4
    found = draws(50, scores, temperature=temperature)
    assert found[5] == 0 and (temperature > 1 or found[3] == 1)


def test_top_k_and_top_p_narrow_the_choice():
    assert set(draws(temperature=2.0, top_k=2).nonzero()[:, 0].tolist()) == {3, 4}
    assert draws(temperature=2.0, top_k=1)[3] == 1
    assert set(draws(temperature=1.0, top_p=0.7).nonzero()[:, 0].tolist()) == {3, 4}
    assert draws(temperature=1.0, top_p=1e-9)[3] == 1
    assert draws(temperature=1.0, top_k=10**9)[0] > 0


def test_penalties_count_and_fade():
    """By hand: each step takes off presence, once, and frequency times a count that fades by half."""
    choose = TokenChoice(Sampling(presence_penalty=0.25, frequency_penalty=1.0, penalty_decay=0.5))
    scores, counts, present, expected = SCORES[:5], [0.0] * 5, set(), []
    for _ in range(12):
        shown = [s - 0.25 * (i in present) - counts[i] for i, s in enumerate(scores.tolist())]
        best = max(range(5), key=shown.__getitem__)
        expected.append(best)
        counts = [count * 0.5 for count in counts]
        counts[best] += 1
        present.add(best)
    assert [int(choose(scores)) for _ in range(12)] == expected
    assert len(set(expected)) > 1
    alone = TokenChoice(Sampling(presence_penalty=0.4))
    assert [int(alone(scores)) for _ in range(6)] == [3, 3, 3, 3, 3, 3]
    alone = TokenChoice(Sampling(presence_penalty=0.6, penalty_decay=0.0))  # presence never fades
    assert [int(alone(scores)) for _ in range(4)] == [3, 4, 3, 3]


def test_a_seed_is_the_choice_and_the_global_random_numbers_are_left_alone():
    def reply(seed):
        choose = TokenChoice(Sampling(temperature=1.0, seed=seed))
        return [int(choose(SCORES)) for _ in range(30)]

    before = torch.get_rng_state()
    assert reply(1) == reply(1) != reply(2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    free = reply(None)
    torch.manual_seed(7)
    assert reply(None) == free != reply(None)


def test_a_reply_ends_before_the_stop_string_that_is_complete_first(vlm):
    tokenizer = vlm.processor.tokenizer

    def text(words, *stop):
        return ReplyText.whole(tokenizer, tokenizer.encode_text(words), stop)

    assert text(" a dog. User: and", "User:") == "a dog."
    assert text(" a dog", "dog", "do", "a dog!") == "a"
    assert text(" abcdx", "abcde", "bcd") == "a"
    assert text(" a ##", "###") == "a ##"  # begun, never complete
    assert text(" 红色的。", "的") == "红色"
    assert text(" a\n\nb", "b") == "a"
    assert text("x", "x") == ""


def test_pieces_do_not_depend_on_how_ids_are_grouped(vlm):
    """And none holds the beginning of a stop string that comes."""
    tokenizer, rng = vlm.processor.tokenizer, random.Random(0)
    parts = [" ", "\n", "#", "##", "ab", "a", "红", "b#", " the", "\n\n"]
    for _ in range(300):
        words = "".join(rng.choices(parts, weights=[3] * 9 + [1], k=12))
        stop = ["###", "ab#", "a a"][: rng.randint(0, 3)]
        ids = tokenizer.encode_bytes(words.encode()[: rng.randint(1, 30)])
        whole = ReplyText.whole(tokenizer, ids, stop)
        reply, pieces, rest = ReplyText(tokenizer, stop), [], list(ids)
        while rest:
            count = rng.randint(1, 3)
            pieces.append(reply.add(rest[:count]))
            rest = rest[count:]
        assert whole.startswith("".join(pieces))
        assert "".join(pieces) + reply.close() == whole
        assert not any(text in whole for text in stop)
