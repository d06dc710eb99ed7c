"""The whole model against recorded numbers of the public code, and where ours deliberately differs."""

import copy

import pytest
import torch
from golden_data import PLACEHOLDER, error, golden_file, meta, tensors

from visualrwkv.checkpoints import load_checkpoint
from visualrwkv.errors import InputError
from visualrwkv.modeling import per_sample_loss
from visualrwkv.scan import layer_orders

TOLERANCE = 2e-4
GRIDS = [-1, 2]
NO_IMAGE = 2  # the recorded sample without an image


@pytest.fixture(scope="module")
def model():
    """The recorded model in float32, tower and embeddings frozen as in the public training code."""
    model, _ = load_checkpoint(golden_file("visualrwkv6.pth"), dtype="float32")
    used = set(tensors("visualrwkv6_io_grid-1")["input_ids"].flatten().tolist())
    for grid in GRIDS:
        used.update(*(case["tokens"] + case["prompt_ids"] for case in meta()[f"grid{grid}"]["generate"]))
    model.config.image_token_id = max(set(range(256)) - used)  # every id of its vocabulary is an ordinary token
    model.generation_config.eos_token_id = model.generation_config.suppress_tokens = None
    model.vit.requires_grad_(False)
    model.rwkv.emb.requires_grad_(False)
    return model


@pytest.fixture(params=GRIDS)
def grid(request, model):
    """Set the model to a recorded grid; the files of grid 2 take their input from those of grid -1."""
    model.config.grid_size = request.param
    recorded = tensors("visualrwkv6_io_grid-1")
    if request.param == 2:
        shared = ("input_ids", "labels", "images", "vit_last_hidden_state")
        recorded = {name: recorded[name] for name in shared} | tensors("visualrwkv6_io_grid2")
    yield recorded, meta()[f"grid{request.param}"]
    model.config.grid_size = -1


def single(model, ids):
    """(1, T) ids of ours from a recorded row: the placeholder once for each feature."""
    ids = [int(i) for i in ids]
    if PLACEHOLDER in ids:
        at = ids.index(PLACEHOLDER)
        ids[at : at + 1] = [model.config.image_token_id] * model.config.num_image_tokens
    return torch.tensor([ids])


def prompt(model, grid, sample):
    """ids and pixels of a recorded prompt."""
    recorded, numbers = grid
    ids = single(model, numbers["generate"][sample]["prompt_ids"])
    return ids, None if sample == NO_IMAGE else recorded["images"][sample]


def public_layout(model, recorded):
    """The rows as the public code lays them out, in place of `model.embed`.

    Every image starts at the same position of the batch: shorter prefixes get token 0 in front, rows without an image
    zeros in its place, and all rows zeros behind.
    """
    rows = recorded["input_ids"]
    places = [row.index(PLACEHOLDER) if PLACEHOLDER in row else None for row in rows.tolist()]
    first = max(place for place in places if place is not None)

    def embed(input_ids, features):
        emb, size = model.rwkv.emb, features.shape[1:]
        out = []
        for row, place, image in zip(rows, places, features, strict=True):
            if place is None:
                parts = [emb(torch.zeros(first, dtype=torch.int64)), torch.zeros(size), emb(row)]
            else:
                before = torch.cat([torch.zeros(first - place, dtype=torch.int64), row[:place]])
                parts = [emb(before), image, emb(row[place + 1 :])]
            out.append(torch.cat(parts))
        length = max(map(len, out))
        out = torch.stack([torch.cat([row, torch.zeros(length - len(row), size[1])]) for row in out])
        return out, torch.tensor([[i, first] for i in range(len(rows))])

    return embed


@pytest.fixture
def in_public_layout(model, grid, monkeypatch):
    """Call the model on the recorded batch, laid out as by the public code."""
    recorded, _ = grid
    monkeypatch.setattr(model, "embed", public_layout(model, recorded))

    def call(**options):
        ids = torch.zeros_like(recorded["labels_prepared"])
        return model(ids, pixel_values=recorded["images"][:, 0], labels=recorded["labels_prepared"], **options)

    return call


def test_image_features(model, grid):
    recorded, _ = grid
    with torch.no_grad():
        assert error(model.vit(recorded["images"][:, 0]).roll(1, 1), recorded["vit_last_hidden_state"]) < 1e-4
        assert error(model.get_image_features(recorded["images"][:, 0]), recorded["image_features"]) < 1e-4


@pytest.mark.parametrize("size", [0, 1, 4])
def test_other_poolings(model, size):
    recorded = tensors("visualrwkv6_io_grid-1")
    model.config.grid_size = size
    with torch.no_grad():
        features = model.get_image_features(recorded["images"][:, 0])
    model.config.grid_size = -1
    assert error(features, recorded[f"image_features_grid{size}"]) < 1e-4


def test_embeddings_logits_and_loss(model, grid, in_public_layout):
    recorded, numbers = grid
    with torch.no_grad():
        embeds, _ = model.embed(None, model.get_image_features(recorded["images"][:, 0]))
        output = in_public_layout()
    assert error(embeds, recorded["inputs_embeds"]) < 1e-5
    assert error(output.logits, recorded["logits"]) < TOLERANCE
    assert error(output.sample_losses, recorded["loss_per_sample"]) < 1e-5
    assert abs(output.loss.item() - numbers["loss"]) < 1e-5


def test_block_outputs(model):
    recorded, numbers = tensors("visualrwkv6_io_grid-1"), meta()["grid-1"]
    starts = torch.tensor([[i, numbers["img_start"]] for i in range(4)])
    orders = layer_orders("bi", 4, starts, (4, 4), (4, numbers["T"]))
    outputs = []
    hooks = [block.register_forward_hook(lambda m, i, out: outputs.append(out[0])) for block in model.rwkv.blocks]
    with torch.no_grad():
        hidden, _ = model.rwkv(recorded["inputs_embeds"], orders=orders)
        unidirectional = model.rwkv.head(model.rwkv(recorded["inputs_embeds"][:1])[0])
    for hook in hooks:
        hook.remove()
    for i, (order, output) in enumerate(zip(orders, outputs[:4], strict=True)):
        if order is not None:
            output = output.gather(1, order.restore[..., None].expand_as(output))
        assert error(output[:2], recorded[f"block_out.{i}"]) < TOLERANCE, f"block {i}"
    assert error(model.rwkv.head(hidden), recorded["logits"]) < TOLERANCE
    assert error(unidirectional[0], recorded["logits_unidirectional_sample0"]) < TOLERANCE


def test_gradients_with_the_penalty_on_the_largest_logit(model, grid, in_public_layout):
    recorded, numbers = grid
    model.config.l2_wrap = True
    model.train()
    loss = in_public_layout().loss
    assert abs(loss.item() - numbers["loss"]) < 1e-5  # the penalty is in the gradients alone
    loss.backward()
    model.eval()
    model.config.l2_wrap = False
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert gradients.keys() == numbers["grad_l2_norm"].keys()
    for name, norm in numbers["grad_l2_norm"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    for name, value in recorded.items():
        if name.startswith("grad."):
            assert error(gradients[name[5:]], value) < 1e-4 * value.abs().max().item(), name


@pytest.mark.parametrize("sample", [0, 1, 3])
def test_generated_tokens(model, grid, sample):
    case = grid[1]["generate"][sample]
    ids, pixels = prompt(model, grid, sample)
    assert ids.shape[1] == case["prefill_len"]
    options = {"do_sample": False, "max_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, pixel_values=pixels, **options)
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    assert tokens == case["tokens"]
    if f"gen_prompt_last_logits.{sample}" in grid[0]:
        assert error(out.logits[0][0], grid[0][f"gen_prompt_last_logits.{sample}"]) < TOLERANCE
    chosen = [step[0, token].item() for step, token in zip(out.logits, tokens, strict=True)]
    assert chosen == pytest.approx(case["token_logits"], abs=TOLERANCE)
    chances = [step[0].softmax(-1)[token].item() for step, token in zip(out.logits, tokens, strict=True)]
    assert chances == pytest.approx(case["token_probs"], abs=1e-4)
    stopped = model.generate(ids, pixel_values=pixels, eos_token_id=case["stop_token_idx"], **options).sequences
    assert stopped[0, ids.shape[1] :].tolist() == case["tokens_with_stop"]


def test_generated_tokens_without_an_image(model, grid):
    """The public code puts zero vectors where an image would be; read that way, the tokens are the recorded ones.

    Ours reads the text alone: a prompt without an image is a prompt of the language model.
    """
    case = grid[1]["generate"][NO_IMAGE]
    ids, _ = prompt(model, grid, NO_IMAGE)
    with torch.no_grad():
        length, size = model.config.num_image_tokens, model.config.text_config.hidden_size
        embeds = torch.cat([torch.zeros(1, length, size), model.rwkv.emb(ids)], 1)
        orders = layer_orders("bi", 4, torch.tensor([[0, 0]]), model.config.feature_grid, embeds.shape[:2])
        hidden, state = model.rwkv(embeds, orders=orders)
        tokens = []
        for _ in range(16):
            tokens.append(model.rwkv.head(hidden[0, -1]).argmax().item())
            hidden, state = model.rwkv(model.rwkv.emb(torch.tensor([[tokens[-1]]])), state)
        assert tokens == case["tokens"]
        assert error(model(ids).logits, model.rwkv.logits(model.rwkv(model.rwkv.emb(ids))[0])) == 0


def test_a_sample_alone_equals_the_recorded_row_that_needed_no_padding(model, grid):
    """The row with the longest prefix stands in the recorded batch as it is, so every position can be compared."""
    recorded, _ = grid
    row = recorded["input_ids"][1, :18]
    ids = single(model, row)
    with torch.no_grad():
        logits = model(ids, pixel_values=recorded["images"][1]).logits
    assert error(logits[0], recorded["logits"][1, : ids.shape[1]]) < TOLERANCE


def test_a_left_padded_batch_equals_its_samples(model, grid):
    """The public code reads token 0 at the left of shorter rows; ours gives each row what it gives alone."""
    recorded, _ = grid
    prompts = [prompt(model, grid, sample) for sample in range(4)]
    length = max(ids.shape[1] for ids, _ in prompts)
    ids = torch.cat([torch.nn.functional.pad(ids, (length - ids.shape[1], 0)) for ids, _ in prompts])
    mask = torch.stack([torch.arange(length) >= length - row.shape[1] for row, _ in prompts]).long()
    pixels = torch.cat([pixels for _, pixels in prompts if pixels is not None])
    with torch.no_grad():
        batch = model(ids, pixel_values=pixels, attention_mask=mask).logits
        for i, (row, image) in enumerate(prompts):
            alone = model(row, pixel_values=image).logits[0]
            assert error(batch[i, length - row.shape[1] :], alone) < 1e-4
            key = f"gen_prompt_last_logits.{i}"
            if i != NO_IMAGE and key in recorded:
                assert error(batch[i, -1], recorded[key]) < TOLERANCE
    # as recorded, sample 0 in a batch differs widely from sample 0 alone
    if "gen_prompt_last_logits.0" in recorded:
        end = meta()["grid-1"]["img_start"] + model.config.num_image_tokens + 11
        assert error(recorded["logits"][0, end - 1], batch[0, -1]) > 0.1


def test_after_truncation_the_right_rows_are_reversed(model):
    """Cutting the front off a row moves its image; the public code goes on reversing the old positions."""
    recorded = tensors("visualrwkv6_io_grid-1")
    cut, start, length = 5, 8, model.config.num_image_tokens
    ids = single(model, recorded["input_ids"][1, :18])[:, cut:]
    with torch.no_grad():
        features = model.get_image_features(recorded["images"][1])
        logits = model(ids, image_features=features).logits
        before, after = ids[:, : start - cut], ids[:, start - cut + length :]
        embeds = torch.cat([model.rwkv.emb(before), features, model.rwkv.emb(after)], 1)

        def read(at):
            orders = layer_orders("bi", 4, torch.tensor([[0, at]]), (4, 4), embeds.shape[:2])
            return model.rwkv.head(model.rwkv(embeds, orders=orders)[0])

        assert error(logits, read(start - cut)) < 1e-5
        assert error(logits, read(start)) > 0.1
    with pytest.raises(InputError, match="an image may not be cut"):
        model(ids[:, 6:], image_features=features)


def test_a_placeholder_at_the_very_front_works_in_any_batch(model):
    """The public code fails on such a row when another row has a longer prefix."""
    recorded = tensors("visualrwkv6_io_grid-1")
    front = single(model, [PLACEHOLDER, 5, 6, 7])
    other = single(model, [9, 10, PLACEHOLDER, 5, 6])
    mask = torch.ones(2, other.shape[1], dtype=torch.int64)
    mask[0, 0] = 0
    with torch.no_grad():
        batch = model(
            torch.cat([torch.nn.functional.pad(front, (1, 0)), other]),
            pixel_values=recorded["images"][:2, 0],
            attention_mask=mask,
        ).logits
        assert error(batch[0, 1:], model(front, pixel_values=recorded["images"][0]).logits[0]) < 1e-4
        assert error(batch[1], model(other, pixel_values=recorded["images"][1]).logits[0]) < 1e-4


def test_two_images_in_one_row(model):
    """The public code raises an error; here each image is read in its own place and order."""
    images = tensors("visualrwkv6_io_grid-1")["images"][:2, 0]
    ids = torch.cat([single(model, [1, PLACEHOLDER, 2]), single(model, [3, PLACEHOLDER, 4, 5])], 1)
    with torch.no_grad():
        both = model(ids, pixel_values=images).logits
        first = model(ids[:, :19], pixel_values=images[:1])
        second = model(ids[:, 19:], pixel_values=images[1:], cache=first.cache)
        swapped = model(ids, pixel_values=images.flip(0)).logits
    assert error(both, torch.cat([first.logits, second.logits], 1)) < 1e-4
    assert error(both[:, -1], swapped[:, -1]) > 1e-3


def test_features_may_be_kept(model):
    images = tensors("visualrwkv6_io_grid-1")["images"][0]
    ids = single(model, [1, PLACEHOLDER, 2])
    with torch.no_grad():
        features = model.get_image_features(images)
        assert error(model(ids, image_features=features).logits, model(ids, pixel_values=images).logits) == 0


def test_the_cls_feature_of_version_5_stands_in_front(model):
    images = tensors("visualrwkv6_io_grid-1")["images"][:2, 0]
    with torch.no_grad():
        behind = model.get_image_features(images)
        model.config.cls_first = True
        front = model.get_image_features(images)
        orders = []
        hook = model.rwkv.register_forward_pre_hook(lambda m, args: orders.append(args[3]))
        model(single(model, [1, PLACEHOLDER, 2]), image_features=front[:1])
    hook.remove()
    model.config.cls_first = False
    assert torch.equal(front, behind.roll(1, 1))
    assert orders[0][1].read[0].tolist() == [0, 1, *range(17, 1, -1), 18]


def test_numbers_of_images_and_places_must_agree(model):
    images = tensors("visualrwkv6_io_grid-1")["images"][:2, 0]
    ids = single(model, [1, PLACEHOLDER, 2])
    with pytest.raises(InputError, match="places for 1 images .* but 2 were given"):
        model(ids, pixel_values=images)
    with pytest.raises(InputError, match="places for 1 images .* but 0 were given"):
        model(ids)
    with pytest.raises(InputError, match="places for 0 images .* but 2 were given"):
        model(torch.tensor([[1, 2]]), pixel_values=images)
    with pytest.raises(InputError, match="either pixel_values or image_features"):
        model(ids, pixel_values=images, image_features=images)
    with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(TypeError):
        model(ids, pixels=images)


def test_loss_is_a_mean_over_samples():
    """A sample with one label counts as much as one with many; a sample without labels counts as 0."""
    logits = torch.randn(3, 5, 7)
    labels = torch.full((3, 5), -100)
    labels[0, 1:] = torch.tensor([1, 2, 3, 4])
    labels[1, 4] = 6
    losses = per_sample_loss(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits[0, :4], labels[0, 1:])
    assert losses[0].item() == pytest.approx(expected.item(), abs=1e-6)
    assert losses[1].item() == pytest.approx(-logits[1, 3].log_softmax(-1)[6].item(), abs=1e-6)
    assert losses[2] == 0
    labels[:] = -100
    assert per_sample_loss(logits.requires_grad_(), labels).sum().item() == 0


def test_parts_of_the_model_may_have_different_dtypes(model):
    """A frozen tower in half precision saves memory while the rest learns in float32; or only the projector is wide."""
    ids, pixels = single(model, [1, PLACEHOLDER, 2]), tensors("visualrwkv6_io_grid-1")["images"][0]
    with torch.no_grad():
        expected = model(ids, pixel_values=pixels).logits
        for wide in (["vit"], ["vit", "rwkv"], ["proj"]):
            mixed = copy.deepcopy(model)
            for part in wide:
                mixed.get_submodule(part).double()
            assert error(mixed(ids, pixel_values=pixels).logits.float(), expected) < 1e-3, wide


def test_a_frozen_tower_stays_in_evaluation_mode(model):
    model.train()
    assert model.rwkv.training and not model.vit.training
    model.eval()
