"""Where models come from: folders, files, the Hub; and what is said when they cannot be used."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import visualrwkv
from visualrwkv import InputError
from visualrwkv.checkpoints import convert


def test_prompt_and_scan_change_what_the_model_sees(random_folder, pictures):
    seen = []
    for option in ({}, {"prompt": "first"}, {"prompt": "last"}, {"scan": "uni"}, {"scan": "multi"}):
        vlm = visualrwkv.load(random_folder, **option)
        turns = [[visualrwkv.prompt.Turn("user", "What is it?", images=1)]]
        with torch.no_grad():
            seen.append(vlm.model(**vlm.processor.prepare([[pictures[0]]], turns)).logits[0, -1])
    for one in range(len(seen)):
        for two in range(one):
            assert not torch.allclose(seen[one], seen[two], atol=1e-5), (one, two)


def test_load_options(random_folder):
    assert visualrwkv.load(random_folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert visualrwkv.load(random_folder, dtype=torch.float64, device="cpu").model.dtype == torch.float64
    for option, value in (
        ("dtype", "int4"),
        ("device", "abacus"),
        ("device", "cuda:99"),
        ("device", "hip"),
        ("prompt", "below"),
        ("scan", "zigzag"),
        ("quantize", "int3"),
        ("prompt", 3),
        ("scan", ["uni"]),
    ):
        with pytest.raises(InputError, match=re.escape(str(value))):
            visualrwkv.load(random_folder, **{option: value})


def test_names_that_are_none(random_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(random_folder)
    for name in ("", 123, True, b"path", [str(random_folder)], "a\0b"):
        with pytest.raises(InputError, match="is no path; pass a folder"):
            visualrwkv.load(name)
    for name in ("~no-such-user/model", "x" * 5000):
        with pytest.raises(InputError, match="no such folder or file"):
            visualrwkv.load(name)
    assert visualrwkv.load("embedded").fingerprint() == visualrwkv.load().fingerprint()
    (tmp_path / "embedded").symlink_to(random_folder)
    monkeypatch.chdir(tmp_path)
    assert visualrwkv.load("embedded").fingerprint() == visualrwkv.load(random_folder).fingerprint()


def test_float16_is_computed_as_float32_on_the_cpu(random_folder, tmp_path):
    """Kernels of the CPU are for float32 and bfloat16; in float16 the modules take many times as long."""
    visualrwkv.load(random_folder, dtype="float16").model.save_pretrained(tmp_path)
    visualrwkv.load(random_folder).processor.save_pretrained(tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert {p.dtype for p in visualrwkv.load(tmp_path, device="cpu").model.parameters()} == {torch.float32}
    assert visualrwkv.load(tmp_path, device="cpu", dtype="float16").model.dtype == torch.float16
    convert(tmp_path, tmp_path / "official.pth")
    assert visualrwkv.load(tmp_path / "official.pth", device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize("version", [5, 6])
def test_the_auto_class_starts_models_as_from_scratch_does(version, random_folder):
    """Not with what the memory held before: fresh memory is filled with NaN here."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(random_folder)
    config.text_config.version = version
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(config)
        torch.manual_seed(3)
        expected = visualrwkv.VisualRWKVForConditionalGeneration.from_scratch(config).state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all() and torch.equal(tensor, expected[name]), name


def test_tensors_that_a_folder_lacks_start_anew_for_the_auto_class(random_folder, tmp_path):
    """`visualrwkv.load` refuses such a folder; transformers' way warns and makes up what is missing."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(random_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = ["rwkv.blocks.1.att.time_maa_k", "rwkv.blocks.2.att.key.weight", "rwkv.blocks.0.ln1.weight"]
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    fresh = visualrwkv.VisualRWKVForConditionalGeneration.from_scratch(model.config).state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert all(torch.isfinite(found[name]).all() for name in lost)
    assert all(torch.equal(found[name], fresh[name]) for name in (lost[0], lost[2]))


def test_unusable_folders_are_named(random_folder, tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        visualrwkv.load(tmp_path)
    with pytest.raises(InputError, match=r"pass a folder"):
        visualrwkv.load(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(InputError, match=r"must end in \.pth"):
        visualrwkv.load(tmp_path / "notes.txt")

    folder = shutil.copytree(random_folder, tmp_path / "config")
    for text, words in (("{", "cannot be read"), ("[]", "cannot be read"), ('{"model_type": "llava"}', "'llava'")):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=words):
            visualrwkv.load(folder)

    folder = shutil.copytree(random_folder, tmp_path / "tensors")
    tensors = load_file(folder / "model.safetensors")
    tensors["rwkv.extra"] = tensors.pop("rwkv.ln_out.weight")
    tensors["proj.weight"] = tensors["proj.weight"][:, :5].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        visualrwkv.load(folder)
    for words in ("1 missing (rwkv.ln_out.weight)", "1 unexpected (rwkv.extra)", "1 misshapen (proj.weight)"):
        assert words in str(caught.value)

    weights = shutil.copytree(random_folder, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        visualrwkv.load(weights.parent)
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        visualrwkv.load(weights.parent)


@pytest.fixture(scope="module")
def hub(random_folder):
    """A Hub on the loopback address that holds `someone/random` (a folder) and `someone/bare` (one .pth)."""
    files = {"someone/random": {path.name: path.read_bytes() for path in random_folder.iterdir() if path.is_file()}}
    files["someone/bare"] = {"weights.pth": b"not a checkpoint"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in files:
                return self.answer_api("/".join(parts[2:4]), parts[4:])
            content = files.get("/".join(parts[:2]), {}).get(parts[-1])
            if "/".join(parts[:2]) not in files:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if content is None:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            self.answer(200, content, {"ETag": f'"{parts[-1]}-{len(content)}"', "X-Repo-Commit": "0" * 40})

        do_HEAD = do_GET

        def answer_api(self, repo, rest):
            names = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files[repo].items()
            ]
            if rest[:1] == ["tree"]:
                return self.answer(200, json.dumps(names).encode())
            siblings = [{"rfilename": name["path"]} for name in names]
            self.answer(200, json.dumps({"id": repo, "sha": "0" * 40, "siblings": siblings}).encode())

        def answer(self, code, content, headers=None):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOAD = """
import sys, visualrwkv
for name in sys.argv[1:]:
    try:
        print("loaded", visualrwkv.load(name).model.num_parameters())
    except visualrwkv.InputError as error:
        print("refused", error)
"""


def load_elsewhere(cache, *names, **environment):
    """Load in a process of its own, since the Hub's client reads its environment on import; a line for each name."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_models_come_from_the_hub_and_failures_name_the_remedy(hub, vlm, tmp_path):
    loaded = f"loaded {vlm.model.num_parameters()}"
    wrong = ("someone/unknown", "someone/bare", "someone/bare:other.pth", "someone/bare:weights.pth")
    lines = load_elsewhere(tmp_path, "someone/random", *wrong, HF_ENDPOINT=hub)
    words = ("no such repository", "someone/bare:FILE.pth", "no file 'other.pth'", "weights.pth: ")
    assert lines[0] == loaded
    assert len(lines) == 5
    for line, word in zip(lines[1:], words, strict=True):
        assert line.startswith("refused") and word in line

    # what was fetched is there without network; the rest names what to set
    lines = load_elsewhere(tmp_path, "someone/random", "someone/other", "someone/other:weights.pth", HF_HUB_OFFLINE="1")
    assert lines[0] == loaded
    assert len(lines) == 3
    assert all(line.startswith("refused someone/other") and "unset HF_HUB_OFFLINE" in line for line in lines[1:])

    lines = load_elsewhere(tmp_path / "empty", "someone/random", "nonsense", HF_ENDPOINT="http://127.0.0.1:9")
    assert len(lines) == 2
    assert lines[0].startswith("refused someone/random") and "set HF_ENDPOINT to a mirror" in lines[0]
    assert lines[1].startswith("refused nonsense: no such folder or file")
