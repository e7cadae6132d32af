"""Two corpora of image files: odd ones that must be read, with the pixels they stand for, and bad ones that must not.

`docs/security.md` states the policy: formats by content, alpha dropped, first frame, EXIF orientation applied, limits
on the header.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

NOISE = np.random.default_rng(7).integers(0, 256, (30, 50, 3), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(50) * 5, np.arange(30) * 8, [90], indexing="xy"), -1)[:, :, 0].astype(np.uint8)
ORIENTATION = 0x0112


def encoded(image, kind, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def decoded(data):
    """What Pillow alone makes of a file whose compression loses something."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *, depth=8, colour=2, pixels=b"", extra=b""):
    """A PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_png():
    """16 bits a colour, which Pillow reads and does not write."""
    deep = np.random.default_rng(8).integers(0, 2**16, (30, 50, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    return png(50, 30, depth=16, pixels=rows), (deep >> 8).astype(np.uint8)


def odd_images():
    """name -> (file, uint8 pixels (height, width, 3) that the model should see)."""
    alpha = np.dstack([NOISE, np.arange(1500, dtype=np.uint16).reshape(30, 50).astype(np.uint8)])
    palette = Image.fromarray(NOISE).quantize(16)
    grey = NOISE[..., 0]
    grey_pixels = np.repeat(grey[..., None], 3, -1)
    deep_grey = np.arange(1500, dtype=np.uint16).reshape(30, 50)
    frames = [Image.fromarray(np.roll(NOISE, shift, 0)) for shift in (1, 2)]
    few = Image.fromarray(NOISE).quantize(8)
    cmyk = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    jpegs = {
        "cmyk jpeg": cmyk,
        "grey jpeg": encoded(grey, "JPEG"),
        "progressive jpeg": encoded(SMOOTH, "JPEG", progressive=True),
        "jpeg followed by rubbish": encoded(SMOOTH, "JPEG") + b"<html>" * 50,
        "jpeg with a comment and an ICC profile": encoded(
            SMOOTH, "JPEG", comment=b"x" * 9000, icc_profile=b"no profile"
        ),
        "several pictures in a jpeg": encoded(
            SMOOTH, "MPO", save_all=True, append_images=[Image.fromarray(NOISE[::-1])]
        ),
        "lossy webp": encoded(SMOOTH, "WEBP"),
    }
    deep, deep_pixels = deep_png()
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "y" * 50_000, zip=True)
    images = {
        "1x1": (encoded(NOISE[:1, :1], "PNG"), NOISE[:1, :1]),
        "1x1 gif": (encoded(Image.new("P", (1, 1)), "GIF"), np.zeros((1, 1, 3), np.uint8)),
        "as long as is allowed": (encoded(np.tile(NOISE[:2], (1, 8, 1)), "PNG"), np.tile(NOISE[:2], (1, 8, 1))),
        "exactly a tile": (encoded(np.tile(NOISE, (2, 2, 1))[:56, :56], "PNG"), np.tile(NOISE, (2, 2, 1))[:56, :56]),
        "palette with transparency": (encoded(palette, "PNG", transparency=3), np.asarray(palette.convert("RGB"))),
        "palette with a table of alphas": (
            encoded(palette, "PNG", transparency=bytes(range(16))),
            np.asarray(palette.convert("RGB")),
        ),
        "transparent colour": (encoded(NOISE, "PNG", transparency=tuple(NOISE[0, 0].tolist())), NOISE),
        "rgba": (encoded(alpha, "PNG"), NOISE),
        "rgba webp": (encoded(alpha, "WEBP", lossless=True, exact=True), NOISE),
        "grey with alpha": (encoded(Image.fromarray(alpha).convert("LA"), "PNG"), None),
        "one bit": (
            encoded(Image.fromarray(grey > 99), "PNG"),
            np.repeat((grey > 99)[..., None], 3, -1) * np.uint8(255),
        ),
        "16-bit grey": (
            encoded(deep_grey, "PNG"),
            np.repeat(np.minimum(deep_grey, 255)[..., None], 3, -1).astype(np.uint8),
        ),
        "16-bit colour": (deep, deep_pixels),
        "grey": (encoded(grey, "PNG"), grey_pixels),
        "text in a png": (encoded(NOISE, "PNG", pnginfo=text), NOISE),
        "bmp": (encoded(NOISE, "BMP"), NOISE),
        "palette bmp": (encoded(palette, "BMP"), np.asarray(palette.convert("RGB"))),
        "animated gif": (
            encoded(few, "GIF", save_all=True, append_images=[few.rotate(180)], duration=50, loop=0),
            np.asarray(few.convert("RGB")),
        ),
        "transparent gif": (encoded(few, "GIF", transparency=2), np.asarray(few.convert("RGB"))),
        "animated webp": (
            encoded(Image.fromarray(NOISE), "WEBP", save_all=True, append_images=frames, lossless=True, duration=50),
            NOISE,
        ),
        "animated png": (encoded(Image.fromarray(NOISE), "PNG", save_all=True, append_images=frames), NOISE),
        **{name: (data, decoded(data)) for name, data in jpegs.items()},
    }
    grey_alpha = images["grey with alpha"][0]
    images["grey with alpha"] = (grey_alpha, decoded(grey_alpha))
    upright = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]}
    upright |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[:, ::-1]}
    upright |= {7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a.swapaxes(0, 1)[::-1]}
    for orientation, turned in upright.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data = encoded(SMOOTH, "JPEG", exif=exif)
        images[f"exif {orientation}"] = (data, turned(decoded(data)))
    exif[ORIENTATION] = 9
    data = encoded(SMOOTH, "JPEG", exif=exif)
    images["exif 9, which means nothing"] = (data, decoded(data))
    return images


NO_IMAGE = "cannot decode: not a JPEG, PNG, WebP, BMP or GIF image"
TOO_LARGE = "exceeds the limit of 178956970 pixels"


def bad_images():
    """name -> (file, the text, after the name of the image, that refuses it)."""
    good = encoded(NOISE, "PNG")
    jpeg = encoded(NOISE, "JPEG")
    bmp = encoded(NOISE, "BMP")
    webp = encoded(NOISE, "WEBP", save_all=True, append_images=[Image.fromarray(SMOOTH)], duration=50)
    large_webp = bytearray(webp)
    canvas = large_webp.index(b"VP8X") + 12
    large_webp[canvas : canvas + 6] = (2**14 - 1).to_bytes(3, "little") * 2
    size_of_jpeg = jpeg.index(b"\xff\xc0") + 5
    screen = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x08\x01\x00\x00;"
    idat = good.index(b"IDAT")
    return {
        "1x20000": (png(1, 20_000), "1x20000 exceeds the aspect ratio limit of 200"),
        "20000x1": (png(20_000, 1), "20000x1 exceeds the aspect ratio limit of 200"),
        "1x201": (encoded(np.zeros((201, 1), np.uint8), "PNG"), "1x201 exceeds the aspect ratio limit of 200"),
        "bomb": (png(30_000, 30_000, pixels=bytes(2**20)), TOO_LARGE),
        "bomb just above the limit": (png(13_378, 13_378), TOO_LARGE),
        "3 GB of pixels": (png(32_768, 32_768), TOO_LARGE),
        "png of the greatest size": (png(2**31 - 1, 2**31 - 1), TOO_LARGE),
        "bmp of 3 GB": (bmp[:18] + struct.pack("<ii", 32_768, 32_768) + bmp[26:], TOO_LARGE),
        "jpeg of 65535x65535": (jpeg[:size_of_jpeg] + b"\xff" * 4 + jpeg[size_of_jpeg + 4 :], TOO_LARGE),
        "webp of 16384x16384": (bytes(large_webp), TOO_LARGE),
        "gif of 65535x65535": (screen + frame, TOO_LARGE),
        "zero bytes": (b"", NO_IMAGE),
        "zeros": (bytes(5000), NO_IMAGE),
        "html": (b"<!DOCTYPE html><html><body>404 not found</body></html>", NO_IMAGE),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", NO_IMAGE),
        "pdf": (b"%PDF-1.7\n1 0 obj\n", NO_IMAGE),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_IMAGE),
        "tiff": (encoded(NOISE, "TIFF"), NO_IMAGE),
        "icon": (encoded(NOISE, "ICO"), NO_IMAGE),
        "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 " + bytes(200), NO_IMAGE),
        "film": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(500), NO_IMAGE),
        "pickle": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", NO_IMAGE),
        "png without pixels": (png(50, 30), "cannot decode"),
        "png cut short": (good[: len(good) // 2], "cannot decode"),
        "png with a wrong checksum": (good[: idat + 5] + b"\0\0" + good[idat + 7 :], "cannot decode"),
        "png of no width": (png(0, 5), NO_IMAGE),
        "the beginning of a png": (good[:8], NO_IMAGE),
        "jpeg cut short": (jpeg[: len(jpeg) // 2], "cannot decode"),
        "the beginning of a jpeg": (jpeg[:20], NO_IMAGE),
        "webp cut short": (webp[: len(webp) // 3], "cannot decode"),
        "the beginning of a webp": (webp[:16], "cannot decode"),
        "gif without a picture": (screen + b";", NO_IMAGE),
    }


def slow_jpeg(side=5000, scans=20_000):
    """A megabyte that asks a decoder to go over a large picture so many times: some minutes of work."""
    data = encoded(Image.new("RGB", (side, side), (9, 99, 200)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]
