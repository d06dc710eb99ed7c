"""Decoding with a state equals reading everything again, and the transformers interfaces around it."""

from pathlib import Path

import pytest
import torch
from conftest import build_random_model
from golden_data import error
from transformers.generation.streamers import BaseStreamer

from visualrwkv.errors import InputError

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["bi", "uni", "multi"])
def model(request, tmp_path_factory):
    """Four layers, so that `multi` reads in all its directions."""
    from visualrwkv.loading import read_folder

    folder = build_random_model(tmp_path_factory.mktemp("models") / request.param, scan=request.param, layers=4)
    return read_folder(folder)[0].requires_grad_(False)


@pytest.fixture(scope="module")
def bi(tmp_path_factory):
    from visualrwkv.loading import read_folder

    return read_folder(build_random_model(tmp_path_factory.mktemp("models") / "one", layers=2))[0].requires_grad_(False)


def row(model, images, seed=0, lead=3):
    """(1, T) ids with text before, between and behind the images, and their pixels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 250, (lead,), generator=generator).tolist()
    for _ in range(images):
        ids += [model.config.image_token_id] * model.config.num_image_tokens
        ids += torch.randint(1, 250, (4,), generator=generator).tolist()
    side = model.config.vision_config.image_size
    pixels = torch.randn(images, 3, side, side, generator=generator) if images else None
    return torch.tensor([ids]), pixels


def batch_of(model, counts):
    """The rows of `counts` images each, left-padded to one batch: ids, mask, pixels, rows."""
    rows = [row(model, images, seed=i, lead=3 + 2 * i) for i, images in enumerate(counts)]
    length = max(ids.shape[1] for ids, _ in rows)
    ids = torch.cat([torch.nn.functional.pad(ids, (length - ids.shape[1], 0)) for ids, _ in rows])
    mask = torch.stack([torch.arange(length) >= length - ids.shape[1] for ids, _ in rows]).long()
    return ids, mask, torch.cat([pixels for _, pixels in rows if pixels is not None]), rows


def read_in_steps(model, ids, pixels, prefill, state=None):
    """Logits of every position: `prefill` at once, the rest token by token."""
    out = model(ids[:, :prefill], pixel_values=pixels, cache=state)
    logits = [out.logits]
    for token in ids[:, prefill:].split(1, dim=1):
        out = model(token, cache=out.cache)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_prefill_and_single_tokens_equal_one_reading(model, images):
    ids, pixels = row(model, images)
    ids = torch.cat([ids, torch.randint(1, 250, (1, 12))], 1)
    whole = model(ids, pixel_values=pixels).logits
    assert error(read_in_steps(model, ids, pixels, ids.shape[1] - 14), whole) < TOLERANCE


@pytest.mark.parametrize("images", [0, 1, 2])
def test_going_on_from_a_state_equals_one_reading(model, images):
    first, first_pixels = row(model, 1, seed=1)
    second, second_pixels = row(model, images, seed=2)
    ids = torch.cat([first, second], 1)
    pixels = first_pixels if second_pixels is None else torch.cat([first_pixels, second_pixels])
    whole = model(ids, pixel_values=pixels).logits[:, first.shape[1] :]
    state = model(first, pixel_values=first_pixels).cache
    kept = state.clone()
    assert error(model(second, pixel_values=second_pixels, cache=state).logits, whole) < TOLERANCE
    assert error(read_in_steps(model, second, second_pixels, second.shape[1] - 2, kept), whole) < TOLERANCE


def test_a_left_padded_batch_equals_its_rows_also_while_decoding(model):
    ids, mask, pixels, rows = batch_of(model, [1, 0, 2])
    steps = torch.randint(1, 250, (3, 6))
    out = model(ids, pixel_values=pixels, attention_mask=mask)
    logits = [out.logits[:, -1:]]
    for token in steps.split(1, dim=1):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        out = model(token, attention_mask=mask, cache=out.cache)
        logits.append(out.logits)
    logits = torch.cat(logits, 1)
    for i, (row_ids, row_pixels) in enumerate(rows):
        alone = model(torch.cat([row_ids, steps[i : i + 1]], 1), pixel_values=row_pixels).logits[0, -7:]
        assert error(logits[i], alone) < TOLERANCE


def test_a_padded_batch_goes_on_from_a_state(model):
    """A second turn of two conversations, of different lengths, padded again."""
    ids, mask, pixels, rows = batch_of(model, [1, 2])
    state = model(ids, pixel_values=pixels, attention_mask=mask).cache
    more, more_mask, more_pixels, more_rows = batch_of(model, [0, 1])
    logits = model(more, pixel_values=more_pixels, attention_mask=more_mask, cache=state).logits[:, -1]
    for i, ((a, a_pixels), (b, b_pixels)) in enumerate(zip(rows, more_rows, strict=True)):
        both = a_pixels if b_pixels is None else torch.cat([a_pixels, b_pixels])
        assert error(logits[i], model(torch.cat([a, b], 1), pixel_values=both).logits[0, -1]) < TOLERANCE


def greedy(model, ids, pixels, count):
    """Tokens chosen by reading everything again each time."""
    for _ in range(count):
        logits = model(ids, pixel_values=pixels, use_cache=False).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def test_generate_greedily(model):
    model.generation_config.eos_token_id = None
    for images in (0, 1, 2):
        ids, pixels = row(model, images)
        expected = greedy(model, ids, pixels, 8)
        assert torch.equal(model.generate(ids, pixel_values=pixels, max_new_tokens=8, do_sample=False), expected)
    ids, mask, pixels, rows = batch_of(model, [1, 0, 2])
    batch = model.generate(ids, pixel_values=pixels, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for i, (row_ids, row_pixels) in enumerate(rows):
        assert torch.equal(batch[i, ids.shape[1] :], greedy(model, row_ids, row_pixels, 8)[0, row_ids.shape[1] :])


def test_generate_continues_a_state(bi):
    """transformers' two ways: all ids, or the new ones with a mask over all; the state has read all but the last."""
    bi.generation_config.eos_token_id = None
    first, pixels = row(bi, 1)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    whole = bi.generate(first, pixel_values=pixels, **(options | {"max_new_tokens": 8})).sequences
    out = bi.generate(first, pixel_values=pixels, **options)
    state = out.cache
    assert state.seen == first.shape[1] + 3
    again = bi.generate(out.sequences, cache=state.clone(), **options).sequences
    assert torch.equal(again, whole)
    mask = torch.ones_like(out.sequences)
    new = bi.generate(out.sequences[:, -1:], attention_mask=mask, cache=state, **options).sequences
    assert torch.equal(new[:, 1:], whole[:, -4:])


def test_generate_refuses_a_state_that_has_read_more_than_is_passed(bi):
    """transformers would read from some place in the middle: new ids need a mask over all, as above."""
    ids, _ = row(bi, 0, lead=6)
    state = bi(ids).cache
    for passed in ({"input_ids": ids[:, -2:]}, {"input_ids": ids}, {"inputs_embeds": bi.rwkv.emb(ids[:, :3])}):
        with pytest.raises(InputError, match="the state has read 6 positions, but only [236] were passed"):
            bi.generate(**passed, cache=state.clone(), max_new_tokens=2)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_beams_with_a_state_equal_beams_without(bi, images):
    bi.generation_config.eos_token_id = None
    ids, pixels = row(bi, images)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with_state = bi.generate(ids, pixel_values=pixels, **options)
    without = bi.generate(ids, pixel_values=pixels, use_cache=False, **options)
    assert with_state.shape == (2, ids.shape[1] + 6)
    assert torch.equal(with_state, without)


def test_beams_of_a_padded_batch_equal_those_of_its_rows(bi):
    ids, mask, pixels, rows = batch_of(bi, [1, 0, 2])
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    batch = bi.generate(ids, pixel_values=pixels, attention_mask=mask, **options)[:, ids.shape[1] :]
    for i, (row_ids, row_pixels) in enumerate(rows):
        alone = bi.generate(row_ids, pixel_values=row_pixels, **options)[0, row_ids.shape[1] :]
        assert torch.equal(batch[i], alone)


def test_sampling_follows_the_seed_and_several_answers_differ(bi):
    ids, mask, pixels, _ = batch_of(bi, [1, 2])
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3, "attention_mask": mask}

    def sample(seed):
        torch.manual_seed(seed)
        return bi.generate(ids, pixel_values=pixels, **options)

    answers = sample(1)
    assert torch.equal(answers, sample(1)) and not torch.equal(answers, sample(2))
    assert answers.shape[0] == 6 and len({tuple(answer.tolist()) for answer in answers[:3]}) == 3
    assert torch.equal(answers[:, : ids.shape[1]], ids.repeat_interleave(3, 0))
    assert not (answers[:, ids.shape[1] :] == bi.config.image_token_id).any()


def test_several_answers_each_see_the_images_of_their_prompt(bi):
    """With one likeliest token kept, all answers of a prompt are its greedy answer."""
    bi.generation_config.eos_token_id = None
    ids, mask, pixels, rows = batch_of(bi, [2, 0, 1])
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 5}
    for extra in ({"pixel_values": pixels}, {"image_features": bi.get_image_features(pixels)}):
        answers = bi.generate(ids, attention_mask=mask, **extra, **options)[:, ids.shape[1] :]
        for i, (row_ids, row_pixels) in enumerate(rows):
            expected = greedy(bi, row_ids, row_pixels, 5)[0, row_ids.shape[1] :]
            assert torch.equal(answers[2 * i], expected) and torch.equal(answers[2 * i + 1], expected)


def test_streamers_get_every_token(bi):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    ids, pixels = row(bi, 1)
    streamer = Collect()
    out = bi.generate(ids, pixel_values=pixels, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_embeddings_in_place_of_ids(bi):
    ids, _ = row(bi, 0, lead=6)
    embeds = bi.get_input_embeddings()(ids)
    assert error(bi(inputs_embeds=embeds).logits, bi(ids).logits) == 0
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(bi.generate(inputs_embeds=embeds, **options), bi.generate(ids, **options)[:, 6:])


def test_an_unused_option_is_refused(bi):
    with pytest.raises(ValueError, match="pictures"):
        bi.generate(row(bi, 0)[0], pictures=1, max_new_tokens=1)


def test_only_the_last_logits(bi):
    ids, pixels = row(bi, 1)
    whole = bi(ids, pixel_values=pixels)
    last = bi(ids, pixel_values=pixels, logits_to_keep=2)
    assert last.logits.shape[1] == 2 and error(last.logits, whole.logits[:, -2:]) < 1e-5
    as_tuple = bi(ids, pixel_values=pixels, return_dict=False)
    assert error(as_tuple[0], whole.logits) == 0


def test_saved_and_loaded_by_the_auto_class(bi, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    ids, pixels = row(bi, 1)
    bi.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(bi.config)
    assert config.text_config.to_dict() == bi.config.text_config.to_dict()
    assert config.vision_config.to_dict() == bi.config.vision_config.to_dict()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).requires_grad_(False)
    assert type(again) is type(bi)
    assert error(again(ids, pixel_values=pixels).logits, bi(ids, pixel_values=pixels).logits) == 0
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half(ids, pixel_values=pixels).logits).all()


def test_pipeline(random_folder, pictures):
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    model = AutoModelForImageTextToText.from_pretrained(random_folder)
    processor = AutoProcessor.from_pretrained(random_folder)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "What is the colour?"}]
    chat = [{"role": "user", "content": content}]
    answer = pipe(text=chat, max_new_tokens=4, generate_kwargs={"do_sample": False})
    assert isinstance(answer[0]["generated_text"][-1]["content"], str)


def test_a_pipeline_ends_with_the_reply():
    """With the embedded model, which was trained to end its replies with an empty line."""
    from transformers import pipeline

    from visualrwkv.loading import EMBEDDED

    pipe = pipeline("image-text-to-text", model=str(EMBEDDED), device="cpu")
    picture = {"type": "image", "image": str(Path(__file__).parents[1] / "docs/pictures/scene.png")}
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": "What number is on the sign?"}]}]
    (answer,) = pipe(text=chat, return_full_text=False)
    assert answer["generated_text"].strip() == "42"


def test_stop_strings_of_transformers(random_folder):
    from visualrwkv.loading import read_folder

    model, processor = read_folder(random_folder)
    inputs = processor(text="User: What?\n\nAssistant:", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 20, "eos_token_id": None}
    free = model.generate(**inputs, **options)[0, length:].tolist()
    words = [processor.tokenizer.decode([index]) for index in free]
    stop = next(word for word in words[3:] if word.isprintable() and word.strip())
    ids = model.generate(**inputs, **options, stop_strings=[stop], tokenizer=processor.tokenizer)[0, length:].tolist()
    assert ids == free[: words.index(stop) + 1]


def test_pictures_without_places_are_refused(bi):
    ids, _ = row(bi, 1)
    embeds = bi.rwkv.emb(ids)
    for images in ({"pixel_values": torch.zeros(1, 3, 32, 32)}, {"image_features": torch.zeros(1, 16, 128)}):
        with pytest.raises(ValueError, match="tell no places for images"):
            bi(inputs_embeds=embeds, **images)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    from visualrwkv.loading import read_folder

    model = read_folder(build_random_model(tmp_path / "model"))[0].train()
    ids, mask, pixels, _ = batch_of(model, [1, 0, 2])

    def gradients():
        model.zero_grad()
        model(ids, pixel_values=pixels, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    # renamed in transformers 5
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    saved = gradients()
    assert plain.keys() == saved.keys() and any(name.startswith("vit.") for name in plain)
    for name, gradient in plain.items():
        assert error(saved[name], gradient) <= 1e-6 * max(1, gradient.abs().max().item()), name


def test_ten_lines_of_pytorch_train_it(tmp_path):
    from visualrwkv.loading import read_folder

    model = read_folder(build_random_model(tmp_path / "model"))[0].train()
    ids, pixels = row(model, 1)
    labels = ids.clone()
    labels[:, :-4] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(ids, pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
