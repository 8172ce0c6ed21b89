"""From what a caller sends to what a trunk eats; the same code when fitting and when serving.

What to do is data, `preprocess.json` beside each trunk, so nobody asks which backbone it is. A text
becomes token ids (`tokenizers`, truncated), an image a normalised float32 array [3, height, width]
(Pillow). Images are JPEG, PNG or WEBP, and their pixels are counted before they are decoded: a
20 kB file can hold 170 million.

Not here: padding and batching (core.trunk), limits (core.settings).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from pydantic import BaseModel, Field, TypeAdapter
from tokenizers import Tokenizer

from core.datasets import Modality
from core.errors import InvalidRequest, PayloadTooLarge

FloatArray = npt.NDArray[np.float32]
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
# Pillow's own limit is global and only warns at first; `open_image` refuses by ours.
Image.MAX_IMAGE_PIXELS = None


class TextPreprocess(BaseModel, frozen=True):
    """How a text becomes token ids. `inputs` are the graph's inputs, in any order."""

    type: Literal["text"] = "text"
    max_tokens: int = Field(ge=1, le=8192)
    pad_id: int = Field(ge=0)
    inputs: tuple[Literal["input_ids", "attention_mask", "token_type_ids"], ...]


class ImagePreprocess(BaseModel, frozen=True):
    """How an image becomes pixels: resize, crop the centre, then `(value - mean) / std`.

    `resize` is the length in pixels to which the shorter side goes, or None to resize to the crop
    directly, which ignores the aspect ratio. `mean` and `std` are per channel, on values 0 to 255.
    With `reduced_decode` a JPEG is decoded at a fraction of its size where that is more than
    enough; it is written into each trunk, so that older ones go on as their heads were fitted.
    """

    type: Literal["image"] = "image"
    resize: int | None = Field(default=None, ge=1, le=2048)
    crop: tuple[Annotated[int, Field(ge=1, le=2048)], Annotated[int, Field(ge=1, le=2048)]]
    resample: Literal["bilinear", "bicubic", "lanczos"]
    reduced_decode: bool = False
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


Preprocess = Annotated[TextPreprocess | ImagePreprocess, Field(discriminator="type")]
_ADAPTER: TypeAdapter[TextPreprocess | ImagePreprocess] = TypeAdapter(Preprocess)
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def parse_preprocess(data: bytes) -> TextPreprocess | ImagePreprocess:
    """Read a trunk's `preprocess.json`."""
    return _ADAPTER.validate_json(data)


@dataclass(frozen=True)
class PreparedText:
    """Token ids of one text; `cost` is their number."""

    ids: list[int]

    @property
    def cost(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PreparedImage:
    """One image, float32 [3, height, width]; `cost` is its number of pixels."""

    pixels: FloatArray

    @property
    def cost(self) -> int:
        return int(self.pixels.shape[1] * self.pixels.shape[2])


Prepared = PreparedText | PreparedImage


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image without decoding it; the caller's `load` does that.

    Raises `InvalidRequest` for what is not a JPEG, PNG or WEBP, and `PayloadTooLarge` for one of
    more than `max_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except (OSError, ValueError, SyntaxError):
        raise InvalidRequest("not a readable JPEG, PNG or WEBP image") from None
    if image.width * image.height > max_pixels:
        raise PayloadTooLarge(
            f"image is {image.width}x{image.height}; at most {max_pixels} pixels are allowed"
        )
    return image


def decode_image(data: bytes, max_pixels: int, side: int | None = None) -> Image.Image:
    """Decode an image, upright and in RGB; raises as `open_image` does.

    With `side`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if neither of its sides gets
    shorter than that: most of the pixels of a photograph would be thrown away by the scaling.
    """
    image = open_image(data, max_pixels)
    try:
        if side is not None:
            image.draft(None, (side, side))
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            # Sixteen bits; Pillow's own conversion would make all but the darkest 256 levels white.
            levels = np.asarray(upright).astype(np.uint16) >> 8
            upright = Image.fromarray(levels.astype(np.uint8))
        return upright.convert("RGB")
    except MemoryError:
        raise
    except Exception:
        # Pillow's decoders raise many types on damaged files (OSError, ValueError, struct.error,
        # SyntaxError, IndexError); all of them mean the same to the caller.
        raise InvalidRequest("image is damaged or truncated") from None


class TextPreprocessor:
    """Tokenises texts for one trunk. Safe to call from several threads."""

    modality = Modality.TEXT

    def __init__(self, config: TextPreprocess, tokenizer_json: bytes) -> None:
        self.config = config
        self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(config.max_tokens)

    def prepare(self, item: str) -> PreparedText:
        """Tokenise one text, truncated to `max_tokens`."""
        return PreparedText(self._tokenizer.encode(item).ids)

    def prepare_many(self, items: list[str]) -> list[PreparedText]:
        """Tokenise many texts, in parallel where the tokenizer can."""
        return [PreparedText(encoding.ids) for encoding in self._tokenizer.encode_batch(items)]

    def truncated(self, items: list[str]) -> list[int]:
        """Return the numbers of the texts that are longer than `max_tokens`."""
        # A token takes at least one byte, so a short text need not be tokenised again; two more
        # may be added around it.
        long = [
            n for n, text in enumerate(items) if len(text.encode()) > self.config.max_tokens - 2
        ]
        encodings = self._tokenizer.encode_batch([items[n] for n in long])
        return [n for n, encoding in zip(long, encodings, strict=True) if encoding.overflowing]


class ImagePreprocessor:
    """Decodes and scales images for one trunk. Safe to call from several threads."""

    modality = Modality.IMAGE

    def __init__(self, config: ImagePreprocess, max_pixels: int) -> None:
        self.config = config
        self._max_pixels = max_pixels
        self._mean = np.asarray(config.mean, np.float32)
        self._std = np.asarray(config.std, np.float32)

    def prepare(self, item: bytes) -> PreparedImage:
        """Decode and scale one encoded image; raises as `decode_image` does."""
        height, width = self.config.crop
        side = max(height, width, self.config.resize or 0)
        image = decode_image(item, self._max_pixels, side if self.config.reduced_decode else None)
        resampling = _RESAMPLING[self.config.resample]
        if self.config.resize is None:
            image = image.resize((width, height), resampling)
        else:
            scale = self.config.resize / min(image.size)
            # Never smaller than the crop, or the crop would reach outside the picture.
            size = (
                max(width, round(image.width * scale)),
                max(height, round(image.height * scale)),
            )
            # Only what the crop keeps is ever computed: scaled whole, a strip of 1 x 20,000 pixels
            # would take gigabytes.
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            across, down = image.width / size[0], image.height / size[1]
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            image = image.resize((width, height), resampling, box=box)
        # Channel by channel: with the three values innermost it takes three times as long.
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels -= self._mean[:, None, None]
        pixels /= self._std[:, None, None]
        return PreparedImage(pixels)


Preprocessor = TextPreprocessor | ImagePreprocessor
