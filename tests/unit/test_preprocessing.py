"""Preprocessing: hostile and odd inputs become the right array, or a refusal with a reason."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.errors import InvalidRequest, PayloadTooLarge
from core.preprocessing import (
    ImagePreprocess,
    ImagePreprocessor,
    TextPreprocess,
    TextPreprocessor,
    decode_image,
    open_image,
    parse_preprocess,
)
from tests.builders import encoded_image, tokenizer_json

PIXELS = 1_000_000
PLAIN = {"resample": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1)}


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right, 40 x 20."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    return image.convert(mode)


# -- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats(format: str):
    image = decode_image(encoded_image((200, 100, 50), format=format), PIXELS)
    assert (image.mode, image.size) == ("RGB", (12, 9))
    assert np.allclose(np.asarray(image)[4, 4], (200, 100, 50), atol=4)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PDF", "JPEG2000"])
def test_no_other_format(format: str):
    data = encoded_image(format=format)
    with pytest.raises(InvalidRequest, match="JPEG, PNG or WEBP"):
        decode_image(data, PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_turned_camera_does_not_turn_the_picture(orientation: int, format: str):
    upright = halves()
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)  # fmt: skip
    stored = upright.transpose(turn) if turn is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format != "PNG" else {}
    decoded = decode_image(encoded(stored, format, exif=exif, **options), PIXELS)
    assert decoded.size == upright.size
    assert np.allclose(np.asarray(decoded)[10, 5], (255, 0, 0), atol=12)
    assert np.allclose(np.asarray(decoded)[10, 35], (0, 0, 255), atol=12)


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "1", "PA"])
def test_every_kind_of_png_becomes_rgb(mode: str):
    if mode == "PA":
        image = halves("P")
        data = encoded(image, transparency=0)
    else:
        data = encoded(halves(mode))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = np.asarray(decode_image(data, PIXELS))
    assert decoded.shape == (20, 40, 3)
    left, right = decoded[10, 5].astype(int), decoded[10, 35].astype(int)
    if mode in ("P", "RGBA", "PA"):
        assert left[0] > 200 > 50 > left[2]
        assert right[2] > 200 > 50 > right[0]
    else:
        assert len(set(left)) == len(set(right)) == 1


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_sixteen_bits_keep_their_brightness(level: int):
    data = encoded(Image.fromarray(np.full((6, 6), level * 257, np.uint16)))
    assert np.asarray(decode_image(data, PIXELS))[3, 3].tolist() == [level] * 3


def test_a_cmyk_jpeg_becomes_rgb():
    decoded = decode_image(encoded(halves("CMYK"), "JPEG"), PIXELS)
    assert decoded.mode == "RGB"
    assert np.asarray(decoded)[10, 5, 0] > 200


@pytest.mark.parametrize("format", ["WEBP", "PNG"])
def test_of_an_animation_the_first_frame(format: str):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    decoded = decode_image(data, PIXELS)
    assert np.allclose(np.asarray(decoded)[4, 4], (255, 0, 0), atol=8)


def black_png(width: int, height: int) -> bytes:
    """A PNG of any size in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    packer = zlib.compressobj(9)
    line = b"\0" * ((width + 7) // 8 + 1)
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_a_bomb_is_refused_before_it_is_decoded():
    data = black_png(13_000, 13_000)
    assert len(data) < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge, match="13000x13000"):
            decode_image(data, 25_000_000)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert open_image(data, 13_000 * 13_000).size == (13_000, 13_000)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_cut_image_is_refused(format: str):
    data = encoded(Image.effect_noise((64, 64), 50), format)
    for keep in range(0, len(data) - 20, max(1, len(data) // 40)):
        with pytest.raises(InvalidRequest):
            decode_image(data[:keep], PIXELS)


SAMPLES = [
    encoded(halves(), format, **options)
    for format, options in [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})]
] + [encoded(halves("P"), transparency=0), encoded(halves("LA"))]


@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=8))))
def test_a_damaged_image_is_decoded_or_refused_and_nothing_else(
    data: bytes, edits: list[tuple[int, bytes]]
):
    damaged = bytearray(data)
    for place, junk in edits:
        place %= len(damaged)
        damaged[place : place + len(junk)] = junk
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(InvalidRequest):
            assert decode_image(bytes(damaged), PIXELS).mode == "RGB"


# -- scaling -------------------------------------------------------------------------------------


def preprocessor(max_pixels: int = 25_000_000, **config: object) -> ImagePreprocessor:
    return ImagePreprocessor(ImagePreprocess.model_validate({**PLAIN, **config}), max_pixels)


def test_pixels_are_normalised_by_channel():
    config = {"crop": (4, 6), "mean": (127, 0, 10), "std": (128, 1, 2)}
    prepared = preprocessor(**config).prepare(encoded_image((255, 7, 20)))
    assert prepared.pixels.shape == (3, 4, 6)
    assert prepared.pixels.dtype == np.float32
    assert prepared.pixels.flags["C_CONTIGUOUS"]
    assert prepared.pixels[:, 2, 3].tolist() == [1.0, 7.0, 5.0]
    assert prepared.cost == 24


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [((64, 48), 32, (24, 24)), ((48, 64), 32, (24, 24)), ((30, 200), 20, (20, 20)),
     ((500, 333), 256, (224, 224)), ((10, 10), 32, (24, 28)), ((33, 97), 17, (30, 12))],
)  # fmt: skip
def test_the_crop_is_that_of_the_whole_picture_scaled(
    size: tuple[int, int], resize: int, crop: tuple[int, int], resample: str
):
    """What is computed of the picture is only the crop; it must not show."""
    picture = Image.effect_noise(size, 60).convert("RGB")
    height, width = crop
    scale = resize / min(size)
    whole = picture.resize(
        (max(width, round(size[0] * scale)), max(height, round(size[1] * scale))),
        Image.Resampling[resample.upper()],
    )
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    expected = np.asarray(whole.crop((left, top, left + width, top + height)), np.float32)
    config = {"crop": crop, "resize": resize, "resample": resample}
    prepared = preprocessor(**config).prepare(encoded(picture))
    assert np.abs(prepared.pixels.transpose(1, 2, 0) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 25_000), (25_000, 1), (1, 1)])
@pytest.mark.parametrize("resize", [None, 256])
def test_a_strip_does_not_take_gigabytes(size: tuple[int, int], resize: int | None):
    prepared = preprocessor(crop=(224, 224), resize=resize).prepare(black_png(*size))
    assert prepared.pixels.shape == (3, 224, 224)


@pytest.mark.parametrize("image", [encoded_image(), encoded(halves("L"), "JPEG"), SAMPLES[2]])
def test_threads_agree(image: bytes):
    prepare = preprocessor(crop=(16, 16)).prepare
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(prepare, [image] * 64))
    assert all(np.array_equal(each.pixels, found[0].pixels) for each in found)


# -- text ----------------------------------------------------------------------------------------


def texts(max_tokens: int = 4) -> TextPreprocessor:
    config = TextPreprocess(max_tokens=max_tokens, pad_id=0, inputs=("input_ids",))
    return TextPreprocessor(config, tokenizer_json())


def test_a_text_becomes_its_tokens_and_no_padding():
    assert texts().prepare("good cat").ids == [2, 6]
    assert texts().prepare("what cat").ids == [1, 6]
    assert texts().prepare("good").cost == 1


def test_a_long_text_is_truncated():
    assert texts().prepare("good bad red blue cat dog").ids == [2, 3, 4, 5]
    assert texts().prepare("cat " * 100_000).cost == 4


def test_many_texts_are_as_one_by_one():
    items = ["good", "bad cat dog", "", "red " * 50]
    assert texts().prepare_many(items) == [texts().prepare(item) for item in items]


def test_one_tokenizer_serves_many_threads():
    shared = texts(64)
    items = ["good " * n + "cat" for n in range(1, 60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(shared.prepare, items * 20))
    assert found == [shared.prepare(item) for item in items] * 20


@pytest.mark.parametrize(
    "config",
    [TextPreprocess(max_tokens=8, pad_id=1, inputs=("input_ids", "attention_mask")),
     ImagePreprocess(crop=(8, 8), resize=9, resample="bicubic", mean=(1, 2, 3), std=(4, 5, 6))],
)  # fmt: skip
def test_a_config_reads_back(config: TextPreprocess | ImagePreprocess):
    assert parse_preprocess(config.model_dump_json().encode()) == config


def test_a_photograph_is_decoded_at_a_fraction_of_its_size_where_that_is_enough():
    photograph = encoded(halves("RGB").resize((1920, 1080)), "JPEG")
    assert decode_image(photograph, PIXELS * 100, 224).size == (480, 270)
    assert decode_image(photograph, PIXELS * 100, 600).size == (1920, 1080)
    assert decode_image(photograph, PIXELS * 100).size == (1920, 1080)
    strip = encoded(halves("RGB").resize((4000, 300)), "JPEG")
    assert decode_image(strip, PIXELS * 100, 224).size == (4000, 300)


def test_a_reduced_decode_changes_little_and_is_the_configs_choice():
    config = ImagePreprocess(
        resize=64, crop=(64, 64), resample="bicubic", mean=(0, 0, 0), std=(255, 255, 255)
    )
    photograph = encoded(halves("RGB").resize((1920, 1080)), "JPEG")
    whole = ImagePreprocessor(config, 10_000_000).prepare(photograph).pixels
    reduced = config.model_copy(update={"reduced_decode": True})
    fraction = ImagePreprocessor(reduced, 10_000_000).prepare(photograph).pixels
    assert not np.array_equal(whole, fraction)
    assert np.abs(whole - fraction).mean() < 0.02
