"""500 odd files, drawn at random: each has the pixels that another decoder or its writer knows, or is refused."""
import io
import os
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_pixels import DEPTHS, bitmap, netpbm, png, written
from torchvision.io import ImageReadMode, decode_gif, decode_jpeg, decode_png, decode_webp

from pid_ssl.data import DataError, open_source

SIDE = 8
RGB = ImageReadMode.RGB


def tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def picture(rng, mode, size=(SIDE, SIDE)):
    """A smooth image, so that lossy formats keep it."""
    rows = np.linspace(0, 4, size[1])[:, None, None] + np.linspace(0, 3, size[0])[None, :, None]
    waves = np.sin(rows + np.array([rng.uniform(0, 6) for _ in range(3)]))
    return Image.fromarray((127 + 120 * waves).astype(np.uint8)).convert(mode)


def odd_png(rng):
    depth, colour = rng.choice(DEPTHS)
    data, _ = png(depth, colour, rng.randrange(10**6))
    return ".png", data, None if depth == 16 else decode_png(tensor(data), RGB).numpy()


def odd_jpeg(rng):
    exif, options = Image.Exif(), dict(quality=rng.choice([40, 75, 95]), progressive=rng.random() < 0.5)
    exif[0x0112] = rng.randint(1, 8)
    im = picture(rng, rng.choice(["L", "RGB", "CMYK"]), (rng.randint(8, 20), rng.randint(8, 20)))
    data = written(im, "JPEG", exif=exif, subsampling=rng.choice([0, 2]), **options)
    return rng.choice([".jpg", ".JPEG"]), data, decode_jpeg(tensor(data), RGB, apply_exif_orientation=True).numpy()


def odd_web(rng):
    kind, read = rng.choice([("GIF", decode_gif), ("WEBP", decode_webp)])
    im = picture(rng, rng.choice(["L", "P", "RGB"] if kind == "GIF" else ["L", "RGB", "RGBA"]))
    more = [picture(rng, "RGB")] * rng.randint(0, 1)
    data = written(im, kind, save_all=True, append_images=more)
    if more and kind == "WEBP":
        return ".webp", data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    theirs = read(tensor(data)).numpy()
    return f".{kind.lower()}", data, (theirs[0] if theirs.ndim == 4 else theirs)[:3]


def odd_netpbm(rng):
    magic, most = rng.choice(["P5", "P6"]), rng.choice([1, 15, 200, 255, 256, 1023, 65535])
    n = SIDE * SIDE * (3 if magic == "P6" else 1)
    values = np.array([rng.randint(0, most) for _ in range(n)])
    data = netpbm(magic, most, values.astype(">u2" if most > 255 else "u1").tobytes())
    right = (values * 255 / most).round().reshape(SIDE, SIDE, -1).repeat(3 if magic == "P5" else 1, 2)
    return rng.choice([".ppm", ".pgm"]), data, None if most > 255 else right.transpose(2, 0, 1)


def odd_bitmap(rng):
    values = np.array([rng.randrange(2**15) for _ in range(64)]).reshape(8, 8)
    colours = np.stack([values >> s & 31 for s in (10, 5, 0)])
    return ".bmp", bitmap(values), (colours * 255 / 31).round()


def tiff(entries, data, order):
    """A TIFF by hand: tag -> values, and what lies in its strips, one after the other."""
    entries, extra, body = entries | {273: [], 278: [SIDE], 279: [len(part) for part in data]}, b"", b""
    start = 8 + 2 + 12 * len(entries) + 4
    entries[273] = (start + 4096 + np.cumsum([0, *entries[279]])[:-1]).tolist()
    for tag in sorted(entries):
        values = entries[tag]
        cell = struct.pack(f"{order}{len(values)}H", *values)
        if len(cell) > 4:
            at, extra = start + len(extra), extra + cell
            cell = struct.pack(f"{order}I", at)
        body += struct.pack(f"{order}HHI", tag, 3, len(values)) + cell.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    table = head + struct.pack(f"{order}H", len(entries)) + body + bytes(4) + extra
    return table.ljust(start + 4096, b"\0") + b"".join(data)


def packed(values, bits, kind):
    """Values as bytes, those of fewer than 8 bits beside each other, a row from a byte on."""
    if bits >= 8:
        return values.astype(kind).tobytes()
    return np.packbits((values.reshape(SIDE, -1, 1) >> np.arange(bits)[::-1] & 1).reshape(SIDE, -1), axis=1).tobytes()


def odd_tiff(rng):
    order, sample, photometric = rng.choice("<>"), rng.choice([1, 1, 1, 2, 3]), rng.choice([0, 1, 2, 3, 5])
    bits = rng.choice({1: [1, 2, 4, 8, 8, 16, 32], 2: [8, 16, 32], 3: [16, 32, 64]}[sample])
    channels, planar = {2: 3, 5: 4}.get(photometric, 1), rng.choice([1, 2])
    values = np.array([rng.randrange(2 ** min(bits, 16)) for _ in range(SIDE * SIDE * channels)])
    values = values.reshape(SIDE, SIDE, channels)
    strips = list(values.transpose(2, 0, 1)) if planar == 2 else [values]
    data = [packed(strip, bits, f"{order}{'uif'[sample - 1]}{max(8, bits) // 8}") for strip in strips]
    entries = {256: [SIDE], 257: [SIDE], 258: [bits] * channels, 259: [1], 262: [photometric], 277: [channels]}
    entries |= {284: [planar], 339: [sample] * channels}
    palette = [rng.randrange(256) * 257 for _ in range(3 * 2 ** min(bits, 8))]
    if photometric == 3:
        entries[320] = palette
    return ".tif", tiff(entries, data, order), seen(values, sample, bits, photometric, palette)


def seen(values, sample, bits, photometric, palette):
    """The colours of a TIFF's values; None for those that 8 bits a channel do not hold."""
    if sample != 1 or bits > 8:
        return None
    if photometric == 3:
        return (np.array(palette).reshape(3, -1)[:, values[..., 0]] // 257).astype(np.uint8)
    x = values * 255 / (2**bits - 1)
    if photometric == 5:
        return np.asarray(Image.fromarray(x.astype(np.uint8), "CMYK").convert("RGB")).transpose(2, 0, 1)
    x = 255 - x if photometric == 0 else x
    return x.round().repeat(3 if x.shape[2] == 1 else 1, 2).transpose(2, 0, 1)


def odd_damaged(rng):
    """A file that ends early: the same pixels, where only what follows them is missing, or refused."""
    suffix, data, right = rng.choice([odd_png, odd_jpeg, odd_web, odd_netpbm, odd_bitmap])(rng)
    return suffix, data[: rng.randrange(len(data))], right


def odd_nonsense(rng):
    made = [b"", b"\0" * 100, b"<html>404</html>", rng.randbytes(300), b"\x89PNG\r\n\x1a\n"]
    made.append(written(picture(rng, "RGB"), "JPEG2000"))
    return rng.choice([".png", ".jpg", ".gif", ".TIFF", ".webp"]), rng.choice(made), None


KINDS = [odd_png, odd_jpeg, odd_web, odd_netpbm, odd_bitmap, odd_tiff, odd_damaged, odd_nonsense]
NAMES = ["0", "a b", "é", "-rf", "%s", "a\nb", "v1.2", "x" * 200, os.fsdecode(b"\xff")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(10))
def test_odd_files_give_their_pixels_or_a_clear_error(block, tmp_path):
    """500 under odd names, each between two plain images: one more with the right pixels, or an error that names it."""
    for seed in range(50 * block, 50 * block + 50):
        rng, folder = random.Random(seed), tmp_path / f"{seed}/mine"
        folder.mkdir(parents=True)
        plain = np.asarray(picture(rng, "RGB"))
        for name in ("+.png", "zz.png"):
            Image.fromarray(plain).save(folder / name)
        suffix, data, right = KINDS[seed % len(KINDS)](rng)
        (folder / f"{rng.choice(NAMES)}{suffix}").write_bytes(data)
        source = open_source("mine", str(tmp_path / str(seed)))
        assert len(source.labels["train"]) == 3
        try:
            found = np.concatenate(list(source.chunks("train", np.arange(3), SIDE)))
        except DataError as e:
            assert f"{suffix}: not a readable image (" in str(e) and "; accepted: a whole bmp, gif" in str(e), e
            assert right is None or seed % len(KINDS) > 4, f"{seed}: refused without need: {e}"
            continue
        assert right is not None, f"{seed}: {suffix} was read"
        i = next(i for i in range(3) if not np.array_equal(found[i], plain.transpose(2, 0, 1)))
        assert np.abs(found[i].astype(int) - cut(right)).max() <= 3, f"{seed}: {suffix}"


def cut(image):
    """The largest square of an image from another decoder, resized."""
    whole = Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0))
    return np.asarray(ImageOps.fit(whole, (SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
