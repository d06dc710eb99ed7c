"""Reading pictures from every source and fitting them to the vision tower."""

import base64
import io
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from golden_data import GOLDEN
from PIL import Image
from safetensors.numpy import load_file

from visualrwkv import image_processing
from visualrwkv.errors import InputError
from visualrwkv.image_processing import CLIP_MEAN, CLIP_STD, MODES, VisualRWKVImageProcessor, load_image

CROPS = load_file(GOLDEN / "clip_preprocess.safetensors")


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height, channels=3):
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[:, :, 0] if channels == 1 else values)


def png_header(width, height):
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", sorted(key for key in CROPS if key.startswith("image")))
def test_golden_crops(name):
    processor = VisualRWKVImageProcessor(size=56)
    crop = np.asarray(processor.fit(Image.fromarray(CROPS[name])))
    np.testing.assert_array_equal(crop, CROPS[name.replace("image", "crop")])
    pixels = processor(CROPS[name], return_tensors="np")["pixel_values"]
    expected = (crop / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(pixels[0], expected.transpose(2, 0, 1), atol=1e-6)
    assert pixels.dtype == np.float32


def test_all_sources_give_the_same_picture(tmp_path):
    image = noise(20, 10)
    data = encoded(image)
    path = tmp_path / "bild 图.png"
    path.write_bytes(data)
    array = np.asarray(image)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [image, path, str(path), data, bytearray(data), memoryview(data), uri, array, array / 255]
    sources += [
        np.dstack([array, np.full((10, 20), 255, np.uint8)]),
        Image.open(path),
        io.BytesIO(data),
        path.open("rb"),
    ]
    sources += ["DATA:image/png;BASE64," + uri.partition(",")[2], array.astype(">u2") * 257]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), array)


def test_arrays_of_greys():
    array = np.arange(200, dtype=np.uint8).reshape(10, 20)
    for source in (array, array[:, :, None], array.astype(np.uint16) * 257, array.astype(np.float32) / 255):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.repeat(array[:, :, None], 3, axis=2))
    assert np.asarray(load_image(np.eye(4, dtype=bool))).max() == 255


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"got \(4, 4, 2\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape"),
        (np.zeros((3, 20, 20), np.uint8), "shape"),
        (np.zeros((4, 4, 3), np.int64), "got int64"),
        (np.full((4, 4), 7.0), "between 0 and 1, got 7 to 7"),
        (np.full((4, 4), np.nan), "between 0 and 1, got nan"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    ],
)
def test_unusable_arrays(array, message):
    with pytest.raises(InputError, match=message):
        load_image(array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 10))  # the upper left quarter is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encoded(image, exif=exif))
    assert loaded.size == ((40, 20) if orientation < 5 else (20, 40))
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    for x in (0, 1):
        for y in (0, 1):
            value = loaded.getpixel((x * (loaded.width - 1), y * (loaded.height - 1)))[0]
            assert (value > 128) == ((x, y) == corner)


def test_damaged_exif_is_ignored():
    data = encoded(noise(8, 8), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert load_image(data).size == (8, 8)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert load_image(data).getpixel((3, 3)) == (255, 0, 0)


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert load_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(half)).getpixel((0, 0)) == (255, 127, 127)
    assert load_image(encoded(clear.convert("LA"))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.zeros((4, 4, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert load_image(encoded(palette)).getpixel((0, 0)) == (0, 0, 255)
    assert load_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_other_colour_modes():
    assert load_image(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG")).getpixel((0, 0))[0] > 200
    assert load_image(encoded(Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("HSV", (4, 4), (0, 255, 255))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greys_are_scaled(kind):
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [pixel[0] for pixel in np.asarray(load_image(encoded(image, kind)))[0]] == [0, 100, 255]
    dark = Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint16))
    assert np.asarray(load_image(encoded(dark, kind))).max() <= 1


def test_32_bit_greys_are_scaled():
    for values, expected in (
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 25700, 65535]], np.int32), [0, 100, 255]),
        (np.array([[0, 1]], np.int32), [0, 1]),
        (np.array([[0, 0.2, 1]], np.float32), [0, 51, 255]),
        (np.array([[0, 51, 255]], np.float32), [0, 51, 255]),
        (np.array([[0, np.nan, np.inf]], np.float32), [0, 0, 0]),
    ):
        assert np.asarray(load_image(Image.fromarray(values)))[0, :, 0].tolist() == expected


def broken_sources(folder):
    jpeg = encoded(noise(64, 64), "JPEG")
    png = encoded(noise(64, 64))
    (folder / "notes.png").write_text("not a picture")
    (folder / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    return [
        (folder / "missing.png", "missing.png: no such file"),
        (str(folder), "is a folder"),
        (folder / "notes.png", "notes.png: not an image"),
        (folder / "half.jpg", "half.jpg: the image holds less data"),
        (folder / "empty.png", "empty.png: not an image"),
        (folder / "page.eps", "page.eps: not an image"),
        (folder / "notes.png" / "x", "Not a directory|no such file"),
        ("a\0b.png", "cannot be opened"),
        ("", "no such file"),
        (png[:-60], "the image"),
        (png[:40], "the image"),
        (png.replace(b"IDAT", b"XXXX"), "the image"),
        (b"", "0 bytes"),
        ("https://example.org/a.png", "https://example.org/a.png: addresses are not fetched"),
        ("http://example.org/a.png", "addresses are not fetched"),
        ("data:image/png;base64,!!!", "base64 data are damaged"),
        ("data:image/png,abc", "not a base64 data URI"),
        (42, "from int"),
        (None, "from NoneType"),
    ]


def test_unusable_sources_are_one_line_errors(tmp_path):
    for source, message in broken_sources(tmp_path):
        with pytest.raises(InputError, match=message) as error:
            load_image(source)
        assert "\n" not in str(error.value)


def test_random_damage_is_always_an_input_error_or_a_picture():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        data = encoded(noise(32, 32), kind)
        for _ in range(30):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 4):
                damaged[position] = rng.integers(256)
            try:
                assert load_image(bytes(damaged)).mode == "RGB"
            except InputError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(("width", "height"), [(30000, 30000), (100_000, 20_000), (8000, 8000)])
def test_huge_pictures_are_refused_before_decoding(width, height, tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(width, height))
    tracemalloc.start()
    with warnings.catch_warnings(), pytest.raises(InputError, match="huge.png: .* the limit is 50 million"):
        warnings.simplefilter("error")
        load_image(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_the_limit_can_be_set():
    with pytest.raises(InputError, match="20x10 pixels, the limit is 0.0001 million"):
        load_image(noise(20, 10), max_pixels=100)
    with pytest.raises(InputError, match="the limit"):
        VisualRWKVImageProcessor(max_pixels=100)(noise(20, 10))


def test_the_given_image_is_left_alone(tmp_path):
    path = tmp_path / "a.png"
    noise(8, 8).save(path)
    with Image.open(path) as image:
        load_image(image)
        assert image.getpixel((0, 0)) == noise(8, 8).getpixel((0, 0))
    loaded = load_image(source := noise(8, 8))
    loaded.putpixel((0, 0), (1, 2, 3))
    assert source.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (300, 200), (57, 56), (20_000, 3)])
def test_every_shape_fits(mode, size):
    processor = VisualRWKVImageProcessor(size=56, mode=mode)
    assert processor.fit(Image.new("RGB", size, "red")).size == (56, 56)


STRIPS = """
import resource
from PIL import Image
from visualrwkv.image_processing import MODES, VisualRWKVImageProcessor

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for size in ((1, 2_000_000), (2_000_000, 1), (3, 1_000_000)):
    for mode in MODES:
        strip, before = Image.new("RGB", size, "red"), peak()
        fitted = VisualRWKVImageProcessor(size=336, mode=mode).fit(strip)
        assert fitted.size == (336, 336)
        assert mode == "pad" or fitted.getextrema() == ((255, 255), (0, 0), (0, 0))
        assert peak() - before < 200_000, (mode, size, peak() - before)
"""


def test_a_strip_stays_small_in_memory():
    """A few kilobytes of PNG hold a strip of 50 million pixels, which must not become as many rows of 336."""
    done = subprocess.run([sys.executable, "-c", STRIPS], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-300:]


MODES_OF_FILES = """
import io, resource
from PIL import Image
from visualrwkv.image_processing import load_image

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

files = {}
for mode, kind in (("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("F", "TIFF"), ("I", "TIFF")):
    for side in (40, 3000):  # the small one first: what a decoder loads once is not to be counted
        file = io.BytesIO()
        Image.new(mode, (side, side)).save(file, kind, **({"compression": "tiff_deflate"} if kind == "TIFF" else {}))
        files[side, mode] = file.getvalue()
        load_image(files[40, mode])
before = peak()
for (side, mode), file in files.items():
    load_image(file)
    assert peak() - before < 90, (mode, peak() - before)
"""


def test_opening_takes_ten_bytes_a_pixel_whatever_the_mode():
    """Two pictures as RGB, which Pillow keeps in four bytes a pixel, and little else; here of 9 million pixels."""
    done = subprocess.run([sys.executable, "-c", MODES_OF_FILES], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-300:]


@pytest.mark.parametrize("size", [(61, 47), (1, 300), (300, 1)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "P", "I;16", "I;16B", "I", "F"])
def test_pictures_are_converted_part_by_part(monkeypatch, mode, size):
    image = noise(*size, 4)
    if mode == "P":
        image = image.quantize(9)  # with half transparent colours
    elif mode in ("I", "F"):
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.int32 if mode == "I" else np.float32) * 300)
    elif mode.startswith("I;16"):
        image = Image.frombytes(mode, size, np.asarray(image)[:, :, :2].tobytes())
    elif mode != "RGBA":
        image = image.convert("LA").convert(mode)
    assert image.mode == mode
    whole = load_image(image)
    for pixels in (7, 97):
        monkeypatch.setattr(image_processing, "PART_PIXELS", pixels)
        np.testing.assert_array_equal(load_image(image), whole)


def test_squash_and_pad():
    image = noise(120, 60)
    squashed = VisualRWKVImageProcessor(size=32, mode="squash").fit(image)
    np.testing.assert_array_equal(squashed, image.resize((32, 32), Image.Resampling.BICUBIC))
    colour = tuple(int(255 * mean) for mean in CLIP_MEAN)
    for wide in (image, image.transpose(Image.Transpose.ROTATE_90)):
        square = Image.new("RGB", (120, 120), colour)
        square.paste(wide, ((120 - wide.width) // 2, (120 - wide.height) // 2))
        padded = VisualRWKVImageProcessor(size=32, mode="pad").fit(wide)
        # the two passes of the resampling round in another order for tall pictures
        expected = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(np.asarray(padded, dtype=int) - expected).max() <= 1
        assert padded.getpixel((0, 0)) == colour


def test_batches_and_nesting():
    images = [noise(10, 20), noise(20, 10), noise(30, 30)]
    processor = VisualRWKVImageProcessor(size=28)
    flat = processor(images, return_tensors="pt")["pixel_values"]
    assert flat.shape == (3, 3, 28, 28)
    assert processor([images[:1], images[1:]], return_tensors="pt")["pixel_values"].equal(flat)
    assert processor(images[1], return_tensors="pt")["pixel_values"].equal(flat[1:2])
    assert processor([], return_tensors="pt")["pixel_values"].shape == (0, 3, 28, 28)


def test_save_and_load(tmp_path):
    processor = VisualRWKVImageProcessor(28, "pad", [0.5] * 3, [0.25] * 3, max_pixels=1000)
    processor.save_pretrained(tmp_path)
    again = VisualRWKVImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    changed = VisualRWKVImageProcessor.from_pretrained(tmp_path, mode="squash", size=14)
    assert (changed.mode, changed.size, changed.image_std) == ("squash", 14, [0.25] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size 0"),
        ({"size": {"height": 3}}, "size"),
        ({"mode": "stretch"}, "choose one of crop, squash, pad"),
        ({"image_std": [1, 1]}, "3 numbers each"),
        ({"image_std": [1, 1, 0]}, "std above 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        VisualRWKVImageProcessor(**options)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="do_rescale"):
        VisualRWKVImageProcessor(do_rescale=False)
    with pytest.raises(TypeError, match="do_resize"):
        VisualRWKVImageProcessor()(noise(4, 4), do_resize=False)
