"""Shared by all tests: a tiny model with random weights, pictures, and a fixed seed."""

import os
import warnings

import pytest

# Tests reach no network but their own loopback servers.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, which waiting threads must not keep from the others
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """Built, where there is a compiler, before the first test: none shall need to wait for that minute."""
    from visualrwkv.ops import build

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        build.load()


@pytest.fixture(autouse=True)
def fixed_seed():
    import torch

    torch.manual_seed(0)


def build_random_model(folder, scan="bi", layers=3, seed=0):
    """Write a checkpoint folder with random weights: RWKV-6 of width 128, a ViT of 2 blocks and 4 x 4 patches."""
    import torch

    from visualrwkv import (
        RWKVWorldTokenizer,
        VisualRWKVConfig,
        VisualRWKVForConditionalGeneration,
        VisualRWKVImageProcessor,
        VisualRWKVProcessor,
    )
    from visualrwkv.tokenization import write_vocabulary
    from visualrwkv.vision import describe_tower

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["User:", "Assistant:", " the", " is", " What", " colour", "\n\n", "。\n", "red", " red", " blue", "What"]
    write_vocabulary([bytes([i]) for i in range(256)] + [word.encode() for word in words], folder / "rwkv_vocab.txt")
    tokenizer = RWKVWorldTokenizer(folder / "rwkv_vocab.txt")
    tower = describe_tower({"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}, 64, True)
    config = VisualRWKVConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "num_hidden_layers": layers,
            "time_mix_rank": 8,
            "decay_rank": 8,
        },
        vision_config=tower,
        scan=scan,
        image_token_id=tokenizer.image_token_id,
    )
    model = VisualRWKVForConditionalGeneration.from_scratch(config).eval()
    with torch.no_grad():
        for parameter in model.rwkv.parameters():  # fresh weights hold zeros that would make answers independent
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.rwkv.head.weight.normal_(std=0.5)
    processor = VisualRWKVProcessor(
        VisualRWKVImageProcessor(size=32, mode="squash"), tokenizer, num_image_tokens=config.num_image_tokens
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """A checkpoint folder with random weights; read only."""
    return build_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def vlm(random_folder):
    """The model of `random_folder`, ready to be asked."""
    import visualrwkv

    return visualrwkv.load(random_folder, device="cpu")


@pytest.fixture(scope="session")
def pictures():
    """Four different small RGB pictures."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(4)]


@pytest.fixture(scope="session")
def huge_png():
    """A PNG of 30,000 x 30,000 pixels; its data end early, which shows that nobody starts to decode it."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


@pytest.fixture(scope="session")
def picture_file(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pictures[0].save(path)
    return path


@pytest.fixture
def recipe(tmp_path, random_folder):
    """A function that writes a training recipe with its own output folder and gives the file's path."""
    from training_recipes import BASE

    def write(name="run", text=BASE):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.format(output=tmp_path / name, model=random_folder))
        return path

    return write


@pytest.fixture(scope="module")
def server(random_folder):
    """The demo with the embedded model and one with random weights."""
    from visualrwkv.demo.app import Server

    # clients that vanish are noticed when the next sign of life cannot be sent
    os.environ["GRADIO_HEARTBEAT_INTERVAL"] = "0.5"
    server = Server(["embedded", str(random_folder)], grace=0.5)
    yield server
    server.close()
    del os.environ["GRADIO_HEARTBEAT_INTERVAL"]


@pytest.fixture(scope="module")
def chromium(server):
    from visualrwkv.demo.screenshots import browser

    with browser() as chromium:
        yield chromium


@pytest.fixture
def open_page(chromium, server):
    """Opens the app at a size; in the end no page may have asked anybody else or met an error."""
    from demo_browser import SLOW

    from visualrwkv.demo.screenshots import SIZES

    contexts, asked, errors = [], set(), []

    def open_page(size="wide", locale="en-US", **options):
        width, height = SIZES[size]
        context = chromium.new_context(viewport={"width": width, "height": height}, locale=locale, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.on("request", lambda request: asked.add(request.url.split("?")[0]))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.locator("#examples img").first.wait_for()
        page.wait_for_function("window.visualrwkv")  # page.js, which Gradio starts when all is drawn, listens
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {url for url in asked if not url.startswith((server.url, "data:", "blob:"))} == set()
    assert errors == []
