"""Vision towers: the features of released checkpoints, and other towers of open_clip by name or file."""

import pytest
import torch
from golden_data import error

from visualrwkv.checkpoint_layout import from_official, to_official, vision_config
from visualrwkv.errors import InputError
from visualrwkv.vision import VisionTower, describe_tower, load_tower, pool_grid, tower_config

SMALL = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}


def test_features_are_the_last_hidden_state_of_a_clip_vision_model():
    """Before the final norm, with QuickGELU; here patches come first and CLS last."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=256, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    clip = CLIPVisionModel(config).eval()
    tensors = {name.removeprefix("vision_model."): x for name, x in clip.state_dict().items()}
    tensors = {f"vit.vision_model.{name}": x for name, x in tensors.items() if not name.endswith("position_ids")}
    described = vision_config(tensors, "file")
    tower = VisionTower(described).eval()
    tower.load_state_dict({name.removeprefix("vit."): x for name, x in from_official(tensors).items()})
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip(pixels).last_hidden_state
        assert error(tower(pixels), expected.roll(-1, 1)) < 1e-5
        plain = VisionTower(describe_tower(described.tower, 256, quick_gelu=False)).eval()
        plain.load_state_dict(tower.state_dict())
        assert error(plain(pixels), expected.roll(-1, 1)) > 1e-3  # the activation matters
    back = to_official({f"vit.{name}": x for name, x in tower.state_dict().items()}, described)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "name, image, width, side, has_cls, quick_gelu",
    [
        ("ViT-L-14-336-quickgelu", 336, 1024, 24, True, True),
        ("ViT-B-32", 224, 768, 7, True, False),
        ("ViT-B-32-quickgelu", 224, 768, 7, True, True),
        ("ViT-B-16-SigLIP", 224, 768, 14, False, False),
        ("RN50", 224, 2048, 7, False, False),
        ("convnext_base", 224, 1024, 7, False, False),
    ],
)
def test_towers_by_name(name, image, width, side, has_cls, quick_gelu):
    """Described on the meta device: no weights, no network, no memory."""
    config = tower_config(name)
    assert (config.image_size, config.hidden_size, config.patch_grid) == (image, width, [side, side])
    assert (config.has_cls, config.quick_gelu) == (has_cls, quick_gelu)


def test_weights_of_openai_turn_quickgelu_on():
    assert tower_config("ViT-B-32", "openai").quick_gelu


@pytest.mark.parametrize(
    "tower, has_cls",
    [
        (SMALL, True),
        ({"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg"}, True),
        ({"image_size": 64, "timm_model_name": "convnext_atto"}, False),
        ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, False),
        ({"image_size": 128, "timm_model_name": "visualrwkv_tiny_convstem", "timm_proj": "linear"}, False),
    ],
    ids=["vit", "timm vit", "convnext", "resnet", "convolutional stem"],
)
def test_towers_of_every_family_give_what_their_config_says(tower, has_cls):
    config = describe_tower(tower, 64)
    assert config.has_cls == has_cls
    built = VisionTower(config).eval()
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    rows, columns = config.patch_grid
    with torch.no_grad():
        features = built(pixels)
        assert features.shape == (2, rows * columns + has_cls, config.hidden_size)
        # rows come first: a change in the lower right corner moves the last patch more than the first
        pixels[:, :, -config.image_size // 4 :, -config.image_size // 4 :] += 3
        moved = (built(pixels) - features).abs().mean((0, 2))[: rows * columns]
    assert rows * columns == 1 or moved[-1] > moved[0]


def test_a_config_rebuilds_its_tower_without_a_registry(tmp_path):
    config = tower_config("ViT-B-32")
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.tower == config.tower and again.patch_grid == config.patch_grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_whose_tables_no_file_holds_is_whole_after_loading(dtype, random_folder, tmp_path):
    """The rotary positions of EVA towers are buffers that are computed, not saved; transformers leaves them empty."""
    import visualrwkv
    from visualrwkv.checkpoints import load_checkpoint

    vlm = visualrwkv.load(random_folder)
    tower = {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token"}
    config = type(vlm.model.config).from_dict(vlm.model.config.to_dict() | {"vision_config": describe_tower(tower, 64)})
    model = type(vlm.model).from_scratch(config).to(dtype).eval()
    assert {name for name, _ in model.named_buffers()} - set(model.state_dict())
    model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    torch.save(model.rwkv.state_dict(), tmp_path / "bare.pth")
    again = [visualrwkv.load(tmp_path).model, type(model).from_pretrained(tmp_path).eval()]
    again.append(load_checkpoint(tmp_path / "bare.pth", vision=config.vision_config)[0])
    again[-1].load_state_dict(model.state_dict())
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model.get_image_features(pixels)
        assert all(torch.equal(loaded.get_image_features(pixels), expected) for loaded in again)


def test_weights_from_a_local_file(tmp_path):
    """A whole CLIP model's file, as open_clip writes it."""
    import open_clip

    model = open_clip.create_model("ViT-S-32-alt")
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    tower = load_tower("ViT-S-32-alt", str(tmp_path / "clip.pt"))
    expected = model.visual.state_dict()
    for name, tensor in tower.visual.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_unusable_towers_are_refused(tmp_path):
    with pytest.raises(InputError, match="'ViT-Z' is not known to open_clip"):
        tower_config("ViT-Z")
    with pytest.raises(InputError, match="Input height .32. doesn't match"):
        describe_tower({"image_size": 32, "timm_model_name": "vit_tiny_patch16_224"}, 64)
    with pytest.raises(InputError, match="unexpected keyword argument 'depth'"):
        describe_tower(SMALL | {"depth": 3}, 64)
    (tmp_path / "bad.pt").write_text("no weights")
    with pytest.raises(InputError) as caught:
        load_tower("ViT-S-32-alt", str(tmp_path / "bad.pt"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        load_tower("ViT-S-32-alt", "no-such-tag")
    assert "\n" not in str(caught.value) and "no-such-tag" in str(caught.value)


def test_pooling_averages_squares_of_patches_and_keeps_the_cls_feature():
    features = torch.arange(17.0)[None, :, None]  # 4 x 4 patches counted from 0, CLS 16
    assert pool_grid(features, (4, 4), (4, 4)) is features
    assert pool_grid(features, (4, 4), (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5, 16]
    assert pool_grid(features, (4, 4), (1, 1)).flatten().tolist() == [7.5, 16]
    assert pool_grid(features, (4, 4), (0, 0)).flatten().tolist() == [16]
    assert pool_grid(features[:, :16], (4, 4), (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_grids_that_do_not_fit_are_refused():
    """The public code then gives more rows than asked for."""
    from visualrwkv.configuration import VisualRWKVConfig

    vision = describe_tower(SMALL, 64)
    sizes = {"text_config": {"hidden_size": 64, "num_hidden_layers": 1}, "vision_config": vision}
    assert VisualRWKVConfig(**sizes, grid_size=2).num_image_tokens == 5
    for size in (3, 8, -2):
        with pytest.raises(InputError, match="4x4 patches"):
            VisualRWKVConfig(**sizes, grid_size=size)
    without_cls = describe_tower({"image_size": 128, "timm_model_name": "visualrwkv_tiny_convstem"}, 64)
    with pytest.raises(InputError, match="without a CLS feature"):
        VisualRWKVConfig(**(sizes | {"vision_config": without_cls}), grid_size=0)


def test_the_tiny_tower_starts_knowing_its_places():
    """Of any patch of an empty picture the most similar other one is a neighbour."""
    tower = VisionTower(describe_tower({"image_size": 128, "timm_model_name": "visualrwkv_tiny_convstem"}, 64)).eval()
    with torch.no_grad():
        features = tower(torch.zeros(1, 3, 128, 128))[0]
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    nearest = distances.argmin(1)
    for patch in range(64):
        down, across = nearest[patch] // 8 - patch // 8, nearest[patch] % 8 - patch % 8
        assert abs(down) + abs(across) == 1


def test_norms_of_the_tiny_tower_are_folded_where_nothing_learns():
    tower = VisionTower(describe_tower({"image_size": 128, "timm_model_name": "visualrwkv_tiny_convstem"}, 64))
    pixels = torch.randn(4, 3, 128, 128)
    for _ in range(2):  # the second time the norms have seen other numbers
        tower.train()(torch.randn(4, 3, 128, 128) * 2 + 1)
        tower.eval()
        with torch.no_grad():
            folded = tower(pixels)
        assert error(folded, tower(pixels).detach()) < 1e-5
        with torch.no_grad():
            tower.train()
            assert error(folded, tower(pixels)) > 1e-3
