"""Official files in, folders out, and back: every tensor accounted for, every bit kept."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from golden_data import PLACEHOLDER, error, golden_file, tensors

import visualrwkv
from visualrwkv.checkpoints import convert, load_checkpoint, load_language_model, read_tensors
from visualrwkv.errors import InputError
from visualrwkv.loading import read_folder
from visualrwkv.vision import describe_tower, tower_config


def official():
    return torch.load(golden_file("visualrwkv6.pth"), weights_only=True)


def write(tensors, path):
    torch.save(tensors, path)
    return path


def logits(model):
    """What the model says about a recorded picture."""
    pixels = tensors("visualrwkv6_io_grid-1")["images"][0].to(model.dtype)
    ids = [3, 4, PLACEHOLDER, 5, 6]
    at = ids.index(PLACEHOLDER)
    ids[at : at + 1] = [model.config.image_token_id] * model.config.num_image_tokens
    with torch.no_grad():
        return model(torch.tensor([ids]), pixel_values=pixels).logits.float()


def same(a, b):
    """Equal names, dtypes, shapes and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def refusal(call, *arguments, **options):
    """The one line with which a call refuses its input."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def version_5_parts(folder, name="small"):
    """A VisualRWKV-5 as released, in two parts of float16: the recorded language model and the recorded tower."""
    language = torch.load(golden_file("rwkv5_lm.pth"), weights_only=True)
    visual = {name: x.half() for name, x in official().items() if not name.startswith("rwkv.")}
    return (
        write({name: x.half() for name, x in language.items()}, folder / f"{name}_rwkv.pth"),
        write(visual, folder / f"{name}_visual.pth"),
    )


def test_sizes_are_read_off_the_tensors():
    model, processor = load_checkpoint(golden_file("visualrwkv6.pth"))
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.version, text.num_hidden_layers, text.hidden_size, text.intermediate_size) == (6, 4, 128, 96)
    assert (text.vocab_size, text.num_heads, text.time_mix_rank, text.decay_rank) == (256, 2, 32, 64)
    assert (vision.hidden_size, vision.image_size, vision.patch_grid, vision.has_cls) == (64, 56, [4, 4], True)
    assert vision.tower["layers"] == 3 and vision.tower["head_width"] == 16 and vision.quick_gelu
    assert (model.config.scan, model.config.prompt, model.config.cls_first) == ("bi", "sandwich", False)
    assert model.dtype == torch.bfloat16 and not model.training
    assert processor.num_image_tokens == model.config.num_image_tokens == 17
    assert processor.image_processor.size == 56


@pytest.mark.parametrize(
    "layers, hidden, ffn, mix, decay",
    [(24, 2048, 7168, 32, 64), (32, 2560, 8960, 32, 64), (32, 4096, 14336, 64, 128)],
    ids=["1.6B", "3B", "7B"],
)
def test_released_sizes(layers, hidden, ffn, mix, decay):
    """The three released models, as shapes alone."""
    from visualrwkv.checkpoint_layout import text_config, to_official, vision_config
    from visualrwkv.configuration import VisualRWKVConfig
    from visualrwkv.modeling import VisualRWKVForConditionalGeneration

    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn}
    config = VisualRWKVConfig(text_config=sizes | {"time_mix_rank": mix, "decay_rank": decay})
    with torch.device("meta"):
        model = VisualRWKVForConditionalGeneration(config)
    names = to_official(model.state_dict(), config.vision_config)
    read = text_config(names, "file", "rwkv.")
    assert read.to_dict() == config.text_config.to_dict()
    vision = vision_config(names, "file")
    assert vision.name == config.vision_config.name == "ViT-L-14-336-quickgelu"
    assert (vision.image_size, vision.hidden_size, vision.patch_grid) == (336, 1024, [24, 24])
    assert vision.tower["head_width"] == 64
    assert names["vit.vision_model.embeddings.position_embedding.weight"].shape == (577, 1024)


def test_options_of_loading():
    model, processor = load_checkpoint(
        golden_file("visualrwkv6.pth"), dtype=torch.float32, scan="multi", prompt="last", vision_heads=2
    )
    assert (model.config.scan, processor.prompt, model.dtype) == ("multi", "last", torch.float32)
    assert model.config.vision_config.tower["head_width"] == 32
    assert "5 attention heads" in refusal(load_checkpoint, golden_file("visualrwkv6.pth"), vision_heads=5)


def test_loading_copies_nothing():
    """Tensors of the right dtype stay mapped into the file."""
    model, _ = load_checkpoint(golden_file("visualrwkv6.pth"))
    mapped = open("/proc/self/maps").read() if sys.platform == "linux" else "visualrwkv6.pth"
    assert "visualrwkv6.pth" in mapped
    model.rwkv.head.weight.data.zero_()  # ... privately: changing the model leaves the file alone
    assert official()["rwkv.head.weight"].abs().max() > 0


def test_there_and_back_keeps_every_bit(tmp_path):
    source = official()
    assert convert(golden_file("visualrwkv6.pth"), tmp_path / "folder") == [tmp_path / "folder"]
    assert convert(tmp_path / "folder", tmp_path / "back.pth") == [tmp_path / "back.pth"]
    same(torch.load(tmp_path / "back.pth", weights_only=True), source)
    assert "vit.vision_model.post_layernorm.weight" in source
    assert (tmp_path / "back.pth").stat().st_size < 1.05 * golden_file("visualrwkv6.pth").stat().st_size
    folder, _ = read_folder(tmp_path / "folder")
    file, _ = load_checkpoint(golden_file("visualrwkv6.pth"))
    assert folder.dtype == torch.bfloat16 and folder.config.blank_image and file.config.blank_image
    assert error(logits(folder), logits(file)) == 0


def test_mixed_dtypes_are_kept(tmp_path):
    source = {name: x.float() if name.startswith(("vit.", "proj.")) else x for name, x in official().items()}
    convert(write(source, tmp_path / "mixed.pth"), tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.pth")
    same(torch.load(tmp_path / "back.pth", weights_only=True), source)
    model, _ = load_checkpoint(tmp_path / "mixed.pth")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_position_ids_of_old_files_are_dropped(tmp_path):
    source = official() | {"vit.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    load_checkpoint(write(source, tmp_path / "old.pth"))


def test_version_5_in_two_parts(tmp_path):
    parts = version_5_parts(tmp_path)
    for part in parts:
        model, processor = load_checkpoint(part, dtype="float32")
        assert (model.config.text_config.version, model.config.scan, processor.prompt) == (5, "uni", "first")
        assert model.config.cls_first and not model.config.blank_image
    with torch.no_grad():
        io = tensors("rwkv5_lm_io")
        hidden, _ = model.rwkv(model.rwkv.emb(io["input_ids"]))
        recorded = io["logits"]
        assert error(model.rwkv.head(hidden), recorded) < 0.2 * recorded.abs().max().item()  # float16 weights
    assert torch.isfinite(logits(model)).all()


def test_version_5_there_and_back(tmp_path):
    parts = version_5_parts(tmp_path)
    convert(parts[0], tmp_path / "folder")
    written = convert(tmp_path / "folder", tmp_path / "back_rwkv.pth")
    assert [file.name for file in written] == ["back_rwkv.pth", "back_visual.pth"]
    for part, back in zip(parts, written, strict=True):
        same(torch.load(back, weights_only=True), torch.load(part, weights_only=True))
    convert(tmp_path / "folder", tmp_path / "whole.pth")
    whole, _ = load_checkpoint(tmp_path / "whole.pth")
    assert whole.config.cls_first and whole.dtype == torch.float16


def test_version_5_parts_with_other_names(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    language, visual = version_5_parts(tmp_path)
    language = language.rename(tmp_path / "a" / "language.pth")
    visual = visual.rename(tmp_path / "b" / "tower.pth")
    for one, other in ((language, visual), (visual, language)):
        assert load_checkpoint(one, second=other)[0].config.text_config.version == 5
    assert "one must be NAME_rwkv.pth" in refusal(load_checkpoint, language, second=language)
    assert "does not belong to it" in refusal(load_checkpoint, golden_file("visualrwkv6.pth"), second=visual)
    assert "vision part alone" in refusal(load_checkpoint, visual)


@pytest.mark.parametrize("name", ["rwkv5_lm", "rwkv6_lm"])
def test_bare_language_models(name, tmp_path):
    path = golden_file(f"{name}.pth")
    config, weights = load_language_model(path)
    assert config.version == int(name[4])
    message = refusal(load_checkpoint, path)
    assert "no vision part" in message and "model.from" in message and f"{name}_visual.pth" in message
    convert(path, tmp_path / "folder")
    config_again, weights_again = load_language_model(tmp_path / "folder")
    assert config_again.num_hidden_layers == config.num_hidden_layers
    same(weights_again, weights)
    convert(tmp_path / "folder", tmp_path / "back.pth")
    same(torch.load(tmp_path / "back.pth", weights_only=True), weights)
    assert "no vision part; to train it on pictures, give the folder" in refusal(visualrwkv.load, tmp_path / "folder")
    assert "more than a language model" in refusal(load_language_model, golden_file("visualrwkv6.pth"))


@pytest.mark.parametrize("converted", [False, True])
def test_a_bare_language_model_with_a_new_tower(converted, tmp_path):
    """How training starts: the language model from the file, tower and projector at random."""
    tower = describe_tower({"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}, 64)
    path = golden_file("rwkv6_lm.pth")
    if converted:
        (path,) = convert(path, tmp_path / "folder")
    model, processor = load_checkpoint(path, dtype="float32", vision=tower)
    assert processor.num_image_tokens == 17 and model.config.scan == "bi"
    assert not model.config.cls_first and not model.config.blank_image
    _, weights = load_language_model(golden_file("rwkv6_lm.pth"))
    assert torch.equal(model.rwkv.head.weight, weights["head.weight"].float())
    assert not any(x.is_meta for x in [*model.parameters(), *model.buffers()])
    assert model.proj.weight.std() > 0
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    convert(golden_file("visualrwkv6.pth"), tmp_path / "whole")
    for whole in (golden_file("visualrwkv6.pth"), tmp_path / "whole"):
        assert "has a tower of its own; model.vision is for" in refusal(load_checkpoint, whole, vision=tower)
    assert "is a folder; pass it to visualrwkv.load" in refusal(load_checkpoint, tmp_path / "whole")


def test_other_towers_go_back_under_open_clip_names(tmp_path, random_folder):
    """Where official names cannot say what the tower is, open_clip's names stay, and the folder is needed to load."""
    folder = tmp_path / "folder"
    shutil.copytree(random_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["quick_gelu"] = False
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "file.pth")
    names = read_tensors(tmp_path / "file.pth")
    assert "vit.visual.conv1.weight" in names
    assert "use the folder" in refusal(load_checkpoint, tmp_path / "file.pth")


def test_a_vocabulary_beside_the_file_is_used(tmp_path, random_folder):
    tmp_path = tmp_path / "cats and dogs"
    convert(random_folder, tmp_path / "model.pth")
    message = refusal(visualrwkv.load, tmp_path / "model.pth")  # the World vocabulary would be read in its place
    assert "model.pth: the model has 270 tokens" in message and "needs 65,536; put the rwkv_vocab.txt" in message
    shutil.copy(random_folder / "rwkv_vocab.txt", tmp_path)
    assert visualrwkv.load(tmp_path / "model.pth").ask(None, "What is red?", max_new_tokens=4)
    model, processor = load_checkpoint(tmp_path / "model.pth", vision_heads=2)
    expected, _ = read_folder(random_folder)
    assert processor.tokenizer.image_token_id == model.config.image_token_id == expected.config.image_token_id
    same(dict(model.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("rwkv.blocks.2.att.key.weight"), ["1 missing", "rwkv.blocks.2.att.key.weight"]),
        (lambda t: t.pop("rwkv.emb.weight"), ["rwkv.emb.weight"]),
        (lambda t: t.pop("proj.weight"), ["1 missing", "proj.weight"]),
        (
            lambda t: t.pop("vit.vision_model.encoder.layers.1.self_attn.k_proj.bias"),
            ["1 missing", "vit.vision_model.encoder.layers.1.self_attn.k_proj.bias"],
        ),
        (lambda t: t.update({"rwkv.extra": torch.zeros(2)}), ["1 unexpected", "rwkv.extra"]),
        (
            lambda t: t.update({"proj.weight": torch.zeros(3, 4)}),
            ["1 misshapen", "proj.weight is (3, 4), not (128, 64)"],
        ),
        (lambda t: [t.pop(n) for n in list(t) if "blocks.1." in n], ["28 missing", "rwkv.blocks.1.", "..."]),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("vit.")], ["no CLIP tower"]),
        (lambda t: t.pop("rwkv.blocks.0.att.time_faaaa"), ["rwkv.blocks.0.att.time_faaaa is missing"]),
        (lambda t: t.update({"rwkv.emb.weight": torch.zeros(9)}), ["rwkv.emb.weight is (9,), it needs 2 dimensions"]),
        (
            lambda t: t.update({"vit.vision_model.embeddings.position_embedding.weight": torch.zeros(12, 64)}),
            ["12 position embeddings"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, words):
    source = official()
    change(source)
    message = refusal(load_checkpoint, write(source, tmp_path / "bad.pth"))
    for word in ["bad.pth", *words]:
        assert word in message


def test_other_generations_are_refused(tmp_path):
    source = {name.replace("time_maa_x", "x_x"): x for name, x in official().items()}
    source = {name: x for name, x in source.items() if "time_decay_w1" not in name}
    assert "no RWKV-5 or RWKV-6" in refusal(load_checkpoint, write(source, tmp_path / "seven.pth"))


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(golden_file("visualrwkv6.pth").read_bytes()[:100_000])
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"a": subprocess.Popen}))
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("text.pth", "empty.pth", "cut.pth", "code.pth", "text.safetensors"):
        assert f"{name}: not a readable checkpoint" in refusal(load_checkpoint, tmp_path / name), name
    assert "no such file" in refusal(load_checkpoint, tmp_path / "nothing.pth")
    assert "is a folder" in refusal(load_checkpoint, tmp_path)
    for number, other in enumerate(([1, 2], {"step": 3}, {7: torch.zeros(1)})):
        assert "no dictionary of tensors" in refusal(load_checkpoint, write(other, tmp_path / f"{number}.pth"))
    other = write({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "no VisualRWKV or RWKV checkpoint" in refusal(load_checkpoint, other)


def test_a_file_in_the_old_format_is_read(tmp_path):
    torch.save(official(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old, new = load_checkpoint(tmp_path / "old.pth")[0], load_checkpoint(golden_file("visualrwkv6.pth"))[0]
    assert error(logits(old), logits(new)) == 0


def test_a_safetensors_file_with_the_same_names(tmp_path, random_folder):
    from safetensors.torch import save_file

    from visualrwkv.loading import find

    path = tmp_path / "official.safetensors"
    save_file({name: tensor.clone() for name, tensor in official().items()}, path)
    assert find(path) == path
    ours = load_checkpoint(path, dtype="float32")[0]
    assert error(logits(ours), logits(load_checkpoint(golden_file("visualrwkv6.pth"), dtype=torch.float32)[0])) == 0
    assert "pass that folder" in refusal(find, random_folder / "model.safetensors")


def test_conversions_that_cannot_be(tmp_path, random_folder):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(convert, tmp_path / "empty", tmp_path / "a.pth")
    assert "name a .pth file" in refusal(convert, random_folder, tmp_path / "a.bin")
    assert "is a file already" in refusal(convert, golden_file("visualrwkv6.pth"), tmp_path / "a.pth")
    convert(random_folder, tmp_path / "a.pth")
    assert "exists already" in refusal(convert, random_folder, tmp_path / "a.pth")
    assert "exists already" in refusal(convert, golden_file("visualrwkv6.pth"), random_folder)
    broken = tmp_path / "broken"
    shutil.copytree(random_folder, broken)
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights.pop("proj.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    message = refusal(convert, broken, tmp_path / "b.pth")
    assert "1 missing (proj.weight)" in message
    assert not list(tmp_path.glob("b.pth*"))


def test_a_checkpoint_that_cannot_be_written(random_folder, tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:747] . open file failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="x.pth: cannot be written: .*open file failed"):
        convert(random_folder, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


def test_towers_by_name_are_unaffected_by_the_names_of_files():
    """`quick_gelu` of official files is what open_clip's config of that name says."""
    assert tower_config("ViT-L-14-336-quickgelu").quick_gelu


def test_int8_weights_are_refused(random_folder, tmp_path):
    model = visualrwkv.load(random_folder, quantize="int8").model
    torch.save(model.state_dict(), tmp_path / "int8.pth")
    for read in (visualrwkv.load, lambda path: convert(path, tmp_path / "folder")):
        with pytest.raises(InputError, match="holds int8 weights"):
            read(tmp_path / "int8.pth")
