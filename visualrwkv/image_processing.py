"""Pictures in: reading them safely from any source, and resizing them as the released models were trained.

`load_image` accepts what users have (PIL images, paths, bytes, data URIs, arrays) and gives an upright RGB image;
`VisualRWKVImageProcessor` makes normalised pixels of it. Mode "crop" is the CLIP preprocessing with its flooring centre
crop, bit for bit (torchvision's crop is one pixel off at some sizes).
"""

import base64
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from visualrwkv.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 50_000_000
PART_PIXELS = 2**18  # that are converted at a time, where it takes several copies
MODES = ("crop", "squash", "pad")
# what pictures on disk and on the web are; Pillow knows more, among them EPS, which would start an interpreter
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "AVIF", "JPEG2000"),
    *("PPM", "TGA", "ICO", "ICNS", "PCX", "QOI", "SGI", "DDS", "PSD"),
)
_BOOKKEEPING = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map", "_auto_class"}


def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one picture as upright RGB.

    Orientation from EXIF is applied, of an animation the first frame is taken, transparent parts become white and
    16-bit greys are scaled to 8 bits.

    Args:
        source: PIL image; path; bytes of an image file, or a file open for reading them; `data:` URI; numpy array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool or of floats between 0 and 1.
        max_pixels: larger pictures are refused, for files before they are decoded.

    Raises:
        InputError: not an image, truncated, missing, a directory, too large, an address on the web.
    """
    name, image = "the image", source
    if callable(getattr(source, "read", None)):
        source = source.read()
        if not isinstance(source, bytes):
            raise InputError("an image file must be opened for reading bytes, not text; pass its path, or open it 'rb'")
    if isinstance(source, np.ndarray):
        image = _from_array(source, max_pixels)
    elif isinstance(source, (str, os.PathLike)) and not is_data_uri(str(source)):
        name = str(source) if len(str(source)) < 1000 else f"{str(source)[:77]}..."  # base64 data, most likely
        image = _open(os.path.expanduser(source), name, max_pixels)
    elif isinstance(source, (str, bytes, bytearray, memoryview)):
        data = _from_data_uri(source) if isinstance(source, str) else bytes(source)
        if not data:
            raise InputError("the image holds 0 bytes; pass the content of an image file")
        image = _open(io.BytesIO(data), name, max_pixels)
    elif not isinstance(source, Image.Image):
        kind = type(source).__name__
        raise InputError(f"an image cannot be made from {kind}; pass a PIL image, a path, bytes or a numpy array")
    try:
        _check_size(image.size, name, max_pixels)
        with warnings.catch_warnings():  # Pillow's remarks on odd metadata are not for the user
            warnings.simplefilter("ignore")
            image.load()
            picture = _to_rgb(_upright(image))
            return image.copy() if picture is image else picture
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders answer broken data with almost any exception
        reason = "holds less data than its header promises" if "truncated" in str(error) else f"cannot be read: {error}"
        raise InputError(f"{name}: the image {reason}; is the file damaged?".replace("\n", " ")) from None
    finally:
        if image is not source:
            image.close()  # the result is a copy; this lets go of the file


def is_data_uri(text: str) -> bool:
    """Whether a string holds the data of a picture itself."""
    return text[:5].lower() == "data:"


def _open(file: Any, name: str, max_pixels: int) -> Image.Image:
    """Read the header of an image file."""
    if name.lower().startswith(("http://", "https://")):
        raise InputError(f"{name}: addresses are not fetched; download the picture and pass its path or bytes")
    if isinstance(file, (str, os.PathLike)) and os.path.isdir(file):
        raise InputError(f"{name}: is a folder; pass the path of one image file")
    Image.init()
    try:
        with warnings.catch_warnings():  # the limit says it better
            warnings.simplefilter("ignore")
            return Image.open(file, formats=[key for key in FORMATS if key in Image.OPEN])
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        raise InputError(_too_large(name, "far more", max_pixels)) from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name}: not an image that can be read; convert it to PNG or JPEG") from None
    except Exception as error:  # see load_image
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot be opened as an image: {reason}".replace("\n", " ")) from None


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"{name}: {size} pixels, the limit is {max_pixels / 1e6:g} million; reduce the picture first"


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name}: has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise InputError(_too_large(name, f"{width}x{height}", max_pixels))


def _from_data_uri(source: str) -> bytes:
    header, comma, payload = source.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InputError(f"{header[:40]}: not a base64 data URI; it starts like data:image/png;base64,")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)  # encoders that break lines are common
    except ValueError as error:  # binascii.Error is one
        raise InputError(f"{header[:40]}: the base64 data are damaged: {error}") from None


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        shape = tuple(array.shape)
        raise InputError(f"an image array must have the shape (H, W), (H, W, 3) or (H, W, 4), got {shape}")
    _check_size((array.shape[1], array.shape[0]), "the image array", max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            span = f"{np.min(array):g} to {np.max(array):g}"
            raise InputError(f"an image array of floats must lie between 0 and 1, got {span}; divide by 255")
        array = np.rint(array * 255)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = np.rint(array / 257)
    elif array.dtype == np.bool_:
        array = array * 255
    elif array.dtype != np.uint8:
        raise InputError(f"an image array must be uint8 or float, got {array.dtype}; convert it first")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # a damaged EXIF block (Pillow raises many types) is no reason to refuse the picture
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; the image itself if it is that."""
    if image.mode.startswith("I;16"):
        return _by_parts(image, lambda part: _grey(_values(part) / 257))
    if image.mode in ("I", "F"):  # 32-bit greys: the range tells whether they hold 0..1, 8-bit, 16-bit or wider values
        top = max(_values(part).max() for _, part in _parts(image))
        full = next((limit for limit in (1, 255, 65535) if top <= limit and (limit > 1 or image.mode == "F")), top)
        return _by_parts(image, lambda part: _grey(_values(part) / full * 255))
    if image.has_transparency_data:
        return _by_parts(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _by_parts(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """RGB from parts: a large picture as a whole, in several forms at a time, would take gigabytes."""
    picture = Image.new("RGB", image.size)
    for corner, part in _parts(image):
        picture.paste(convert(part), corner)
    return picture


def _parts(image: Image.Image) -> Iterator[tuple[tuple[int, int], Image.Image]]:
    """Its upper left corner and the part itself, for all parts; strips have parts of the same size."""
    width = min(image.width, PART_PIXELS)
    height = PART_PIXELS // width
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            box = (left, top, min(left + width, image.width), min(top + height, image.height))
            yield (left, top), image.crop(box)


def _values(part: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(part, dtype=np.float64), posinf=0, neginf=0)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _on_white(part: Image.Image) -> Image.Image:
    if part.mode == "La":  # the one mode of Pillow that has a single way out
        part = part.convert("LA")
    part = part.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")


class VisualRWKVImageProcessorKwargs(ImagesKwargs, total=False):
    """Keyword arguments that from_pretrained may override."""

    mode: str
    max_pixels: int


class VisualRWKVImageProcessor(BaseImageProcessor):
    """Pictures -> pixel values for the vision tower.

    Args:
        size: side S of the square that the tower reads, in pixels.
        mode: "crop" resizes the shorter side to S and cuts out the middle (the released models); "squash" resizes to
            S x S; "pad" pads to a square with the mean colour first (LLaVA 1.5). All bicubic.
        image_mean, image_std: per channel, for pixels between 0 and 1; CLIP's by default.
        max_pixels: larger pictures are refused.
    """

    valid_kwargs = VisualRWKVImageProcessorKwargs
    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int = 336,
        mode: str = "crop",
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        max_pixels: int = MAX_PIXELS,
        **kwargs,
    ):
        unknown = sorted(set(kwargs) - _BOOKKEEPING)
        if unknown:
            raise TypeError(f"VisualRWKVImageProcessor got unknown keyword arguments: {', '.join(unknown)}")
        if not isinstance(size, int) or size < 1:
            raise InputError(f"size {size!r} must be a whole number of pixels, such as 336")
        if mode not in MODES:
            raise InputError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise InputError(f"image_mean {image_mean} and image_std {image_std} need 3 numbers each, std above 0")
        super().__init__()
        self.size = size
        self.mode = mode
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]
        self.max_pixels = max_pixels

    def fit(self, image: Image.Image) -> Image.Image:
        """Bring an RGB image to S x S, still as 8-bit pixels."""
        if self.mode == "squash":
            if image.height > 100 * image.width:  # Pillow before 12 widens first: gigabytes for a tall strip
                image = image.resize((image.width, self.size), Image.Resampling.BICUBIC)
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return self._crop(image) if self.mode == "crop" else self._pad(image)

    def _crop(self, image: Image.Image) -> Image.Image:
        size = self.size
        short, long = sorted(image.size)
        if long > 100 * short:  # only the middle will be seen: do not enlarge a long strip before cutting it
            left, top = (max(0, (side - 100 * short) // 2) for side in image.size)
            image = image.crop((left, top, image.width - left, image.height - top))
            short, long = sorted(image.size)
        width, height = (size if side == short else size * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def _pad(self, image: Image.Image) -> Image.Image:
        """Pad to a square, then resize; the long side is resized before the padding, so that a strip stays small."""
        size, (short, long) = self.size, sorted(image.size)
        if long > 100 * max(short, size):  # a hundredth of a pixel wide in the end, however long it is
            long, factor = 100 * size, 100 * size / long
            image = image.resize([max(1, int(side * factor + 0.5)) for side in image.size], Image.Resampling.BICUBIC)
        colour = tuple(int(255 * mean) for mean in self.image_mean)
        width, height = (size if side == long else side for side in image.size)
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        if image.width == image.height:
            return small
        canvas = Image.new("RGB", tuple(size if side == long else long for side in image.size), colour)
        left, top = ((long - side) // 2 if side < long else 0 for side in image.size)
        canvas.paste(small, (left, top))
        return canvas.resize((size, size), Image.Resampling.BICUBIC)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """Load, fit and normalise pictures.

        Args:
            images: a picture in any form `load_image` takes, or a list of them (lists of lists are flattened).
            return_tensors: "pt" for torch tensors, "np" or None for numpy arrays.

        Returns:
            BatchFeature with `pixel_values` (n, 3, S, S), float32.
        """
        if kwargs:
            raise TypeError(f"preprocess got unknown keyword arguments: {', '.join(sorted(kwargs))}")
        mean, std = (np.array(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
        pixels = [
            (np.asarray(self.fit(load_image(source, self.max_pixels)), dtype=np.float32) / 255 - mean) / std
            for source in flatten_images(images)
        ]
        values = np.stack(pixels) if pixels else np.zeros((0, self.size, self.size, 3), dtype=np.float32)
        values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))  # (n, S, S, 3) -> (n, 3, S, S)
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)


def flatten_images(images: Any) -> list:
    """One picture, a list of them or nested lists -> a flat list of sources."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [source for item in images for source in flatten_images(item)]
    return [images]


def open_pictures(images: Any, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """Upright RGB pictures of one question: None, one source, or a list of sources (see `load_image`)."""
    return [load_image(source, max_pixels) for source in flatten_images(images)]
