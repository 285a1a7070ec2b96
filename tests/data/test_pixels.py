"""Pixels are what they seem: every depth, mode and orientation is read as another decoder reads it, or refused."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from pid_ssl.data.images import DataError, decode, pixels, rgb, upright

SIDE = 8
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
ALLOWED = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
DEPTHS = [(depth, colour) for colour, some in ALLOWED.items() for depth in some]


def png(depth, colour, seed=0):
    """A PNG written by hand, and its values."""
    rng, channels = np.random.default_rng(seed), CHANNELS[colour]
    values = rng.integers(0, 2**depth, (SIDE, SIDE * channels))
    bits = (values[..., None] >> np.arange(depth)[::-1]) & 1
    lines = np.packbits(bits.reshape(SIDE, -1), axis=1)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0))
    palette = chunk(b"PLTE", rng.integers(0, 256, 3 * 2**depth, dtype=np.uint8).tobytes()) if colour == 3 else b""
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines)))
    return b"\x89PNG\r\n\x1a\n" + head + palette + body + chunk(b"IEND", b""), values


@pytest.mark.parametrize("depth, colour", DEPTHS)
def test_every_png_is_read_as_torchvision_reads_it_or_refused(depth, colour):
    data, values = png(depth, colour)
    if depth == 16:
        with pytest.raises(DataError, match="more than 8 bits a channel"):
            decode(rgb, data, "it is", "a PNG")
        return
    theirs = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    ours = decode(rgb, data, "it is", "a PNG")
    assert np.array_equal(np.asarray(ours).transpose(2, 0, 1), theirs)


@pytest.mark.parametrize("depth, colour", [(d, t) for d, t in DEPTHS if t in (0, 3) and d < 16])
def test_a_class_is_the_stored_value_or_refused(depth, colour):
    data, values = png(depth, colour)
    if colour == 0 and 1 < depth < 8:
        with pytest.raises(ValueError, match=f"values up to {2**depth - 1} that are read as up to 255"):
            upright(io.BytesIO(data), exact=True)
        return
    im = upright(io.BytesIO(data), exact=True)
    assert np.array_equal(im, values) and im.mode == ("1" if (depth, colour) == (1, 0) else "PL"[colour == 0])


def written(im, kind, **options):
    out = io.BytesIO()
    im.save(out, kind, **options)
    return out.getvalue()


def netpbm(magic, most, values):
    return f"{magic} {SIDE} {SIDE} {most}\n".encode() + values


GREY = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
DEEP = {
    "TIFF of 16 bits": written(Image.fromarray(np.full((8, 8), 999, np.uint16)), "TIFF"),
    "TIFF of floats": written(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"),
    "grey PPM of 16 bits": netpbm("P5", 65535, bytes(128)),
    "grey PPM of 10 bits": netpbm("P5", 1023, bytes(128)),
    "colour PPM of 16 bits": netpbm("P6", 65535, bytes(384)),
    "colour PPM in letters": netpbm("P3", 1023, b"7 " * 192),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_of_other_formats_are_refused(name):
    with pytest.raises(DataError, match="more than 8 bits a channel"):
        decode(rgb, DEEP[name], "it is", "a PNG")


def test_a_small_largest_value_is_stretched_for_an_image_and_refused_for_classes():
    data = netpbm("P5", 15, bytes(range(16)) * 4)
    assert np.asarray(rgb(io.BytesIO(data)))[..., 0].max() == 255
    with pytest.raises(ValueError, match="values up to 15 that are read as up to 255"):
        upright(io.BytesIO(data), exact=True)


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF", "GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_lossless_formats_give_their_pixels(kind, mode):
    if (kind, mode) in {("PPM", "P"), ("GIF", "RGB")}:
        return
    im = GREY.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(rgb(io.BytesIO(written(im, kind, **options))), im.convert("RGB"))


def bitmap(values):
    """A BMP of 16 bits a pixel: 5 of each colour."""
    body = values.astype("<u2").tobytes()
    head = struct.pack("<IHHI", 54 + len(body), 0, 0, 54)
    return b"BM" + head + struct.pack("<IiiHHIIiiII", 40, 8, -8, 1, 16, 0, 0, 0, 0, 0, 0) + body


def test_five_bits_of_a_colour_are_not_sixteen():
    red = np.full((8, 8), 31 << 10)
    assert (np.asarray(rgb(io.BytesIO(bitmap(red)))) == [255, 0, 0]).all()


TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.T,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_images_and_masks_are_turned_as_their_orientation_says(orientation, kind):
    exif, values = Image.Exif(), np.asarray(GREY)[:, :5]
    exif[0x0112] = orientation
    data, turned = written(Image.fromarray(values), kind, exif=exif), TURNS[orientation](values)
    assert np.array_equal(np.asarray(rgb(io.BytesIO(data)))[..., 1], turned)
    assert np.array_equal(upright(io.BytesIO(data), exact=True), turned)
    assert pixels(io.BytesIO(data), 5).shape == (3, 5, 5)


def test_other_formats_are_refused():
    with pytest.raises(DataError, match="cannot identify image file"):
        decode(rgb, written(GREY, "JPEG2000"), "it is", "a PNG")
