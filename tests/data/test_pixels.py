import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from data.pictures import RNG, decoded, encoded, png, write_folder
from PIL import Image, ImageOps, features

from gencore.data import DataError
from gencore.data._formats import FORMATS
from gencore.data.images import ImageSettings, load_images

ORIENTATION = 0x0112
TOP_LEFT = 1


def pixels_of(make, content, name="1.png", **settings):
    """The pixels of a data set of this one image."""
    return load_images(make({name: content}), "train", ImageSettings(**settings)).images[0]


@pytest.mark.parametrize(
    ("format", "suffix"), [(format, suffix) for format, suffixes in FORMATS.items() for suffix in suffixes]
)
def test_every_format_by_every_suffix(tmp_path, format, suffix):
    if format in ("AVIF", "WEBP") and not features.check(format.lower()):
        pytest.skip(f"this Pillow has no {format}")
    image = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    content = qoi(image) if format == "QOI" else encoded(image, format)
    path = write_folder(tmp_path, {f"1{suffix.upper()}": content})
    data = load_images(path, "train")
    assert torch.equal(data.images[0], decoded(content))
    assert data.notes == ()


def qoi(image):
    """QOI, which some versions of Pillow read but do not write: every pixel as it is."""
    pixels = np.asarray(image).reshape(-1, 3)
    body = b"".join(b"\xfe" + pixel.tobytes() for pixel in pixels)
    return b"qoif" + struct.pack(">IIBB", *image.size, 3, 0) + body + bytes(7) + b"\1"


def test_the_table_of_suffixes_has_all_of_pillow():
    Image.init()
    known = {suffix: format for format, suffixes in FORMATS.items() for suffix in suffixes}
    ours = {suffix for suffix, format in Image.registered_extensions().items() if format in FORMATS}
    assert ours <= known.keys()


def test_content_rules_over_the_suffix(make):
    content = encoded(Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)), "BMP")
    assert torch.equal(pixels_of(make, content, "1.jpg"), decoded(content)[:1])


def test_no_format_that_is_not_meant_is_tried(make, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: pytest.fail("Ghostscript is started"))
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    path = make({"1.png": drawing, "2.png": png()})
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read: 1.png \(no image of a format that is read"):
        load_images(path, "train")


def test_a_format_without_a_decoder_is_named(make, monkeypatch):
    from gencore.data import _formats

    content = encoded(Image.new("RGB", (8, 8)), "WEBP")
    monkeypatch.setattr(_formats, "_readable", lambda: ("JPEG", "PNG"))
    with pytest.raises(DataError, match=r"1.webp \(WEBP, which this installation of Pillow cannot decode\)"):
        load_images(make({"1.webp": content, "2.png": png()}), "train")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_orientation_is_applied(make, format, orientation):
    # Wide, with one bright corner: the eight orientations are eight pictures.
    image = np.zeros((16, 32), np.uint8)
    image[:8, :8] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(Image.fromarray(image), format, exif=exif)
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("L"))
    assert expected.shape == ((32, 16) if orientation > 4 else (16, 32))
    pixels = pixels_of(make, content)
    assert np.array_equal(pixels[0].numpy(), expected)


def test_sizes_are_compared_upright(make):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    lying = encoded(Image.new("L", (3, 4), 7), exif=exif)
    assert load_images(make({"1.png": lying, "2.png": png("L", (4, 3))}), "train").spec.image_shape == (1, 3, 4)


def test_orientation_behind_the_pixels_of_a_png(make):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    plain = png("L", (3, 4))
    payload = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(payload) - 4) + payload + struct.pack(">I", zlib.crc32(payload))
    content = plain[:-12] + chunk + plain[-12:]
    pixels = pixels_of(make, content)
    assert torch.equal(pixels, torch.rot90(decoded(plain)[:1], -1, (1, 2)))


def test_damaged_orientation_is_none(make):
    content = encoded(Image.new("L", (4, 3), 9), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff")
    assert pixels_of(make, content, "1.jpg").shape == (1, 3, 4)


def test_gray_among_color_and_across_splits(make):
    gray = png("L")
    path = make({"train/a/1.png": gray, "train/b/1.png": gray, "test/a/1.png": png("RGB")})
    data = load_images(path, "train")
    assert data.spec.image_shape == (3, 3, 4)
    assert torch.equal(data.images[0], decoded(gray))


def test_transparency_is_laid_on_white(make):
    path = make({"a.png": png("RGBA", value=(10, 20, 30, 0)), "b.png": png("RGBA", value=(10, 20, 30, 255))})
    images = torch.cat([load_images(path, split).images for split in ("train", "test")])
    assert {tuple(image[:, 0, 0].tolist()) for image in images} == {(255, 255, 255), (10, 20, 30)}


WIDE = np.array([[0, 127, 128, 129], [257, 385, 386, 32896], [40000, 65406, 65407, 65535]], dtype=np.uint16)
NARROW = np.rint(WIDE / 257).astype(np.uint8)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (encoded(Image.fromarray(WIDE)), "1.png"),
        (encoded(Image.fromarray(WIDE), "TIFF"), "1.tif"),
        (encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), "1.tif"),
        (b"P5 4 3 65535\n" + WIDE.astype(">u2").tobytes(), "1.pgm"),
    ],
    ids=["png", "tiff", "tiff of 32 bits", "pgm"],
)
def test_sixteen_bits_become_eight(make, content, name):
    assert np.array_equal(pixels_of(make, content, name)[0].numpy(), NARROW)


def test_sixteen_bits_with_a_transparent_value(make):
    content = encoded(Image.fromarray(WIDE), transparency=40000)
    expected = NARROW.copy()
    expected[2, 0] = 255
    assert np.array_equal(pixels_of(make, content)[0].numpy(), expected)


@pytest.mark.parametrize(
    ("image", "format", "name"),
    [
        (Image.fromarray(RNG.integers(0, 2, (8, 8), dtype=np.uint8) * 255).convert("1"), "PNG", "1.png"),
        (Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).quantize(5), "GIF", "1.gif"),
        (Image.fromarray(RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8), "CMYK"), "JPEG", "1.jpg"),
        (Image.fromarray(RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8), "CMYK"), "TIFF", "1.tif"),
        (Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8), "YCbCr"), "TIFF", "1.tif"),
    ],
    ids=["bits", "palette", "CMYK JPEG", "CMYK TIFF", "YCbCr"],
)
def test_modes_are_converted_as_pillow_does(make, image, format, name):
    content = encoded(image, format)
    pixels = pixels_of(make, content, name)
    assert torch.equal(pixels, decoded(content)[: len(pixels)])
    assert len(pixels) == (1 if image.mode == "1" else 3)


def test_the_first_picture_of_an_animation(make):
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert set(pixels_of(make, content, "1.gif").flatten().tolist()) == {10}


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (encoded(Image.fromarray(np.ones((3, 4), np.float32)), "TIFF"), "1.tif", "floating point numbers, whose range"),
        (b"Pf 4 3 -1.0\n" + bytes(48), "1.pfm", "floating point numbers, whose range"),
        (encoded(Image.fromarray(np.full((30, 40), 70000, np.int32)), "TIFF"), "1.tif", "integers from 70000 to 70000"),
        (b"", "1.png", "an empty file"),
        (b"hello, this is text", "1.png", "no image of a format that is read, or damaged"),
        (png(size=(40, 30))[:2000], "1.png", "truncated"),
        (encoded(Image.effect_noise((40, 30), 99), "JPEG")[:-200], "1.jpg", "truncated"),
        (b"P5 20000 20000 255\n", "1.pgm", "pixels"),
        (b"P5 12000 12000 255\n", "1.pgm", "12000x12000, over 134217728 pixels"),
    ],
    ids=["float", "pfm", "int", "empty", "text", "cut png", "cut jpeg", "bomb", "large"],
)  # fmt: skip
def test_bad_files_are_named_with_the_reason(make, content, name, reason):
    path = make({f"{split}/{name}": content for split in ("train", "test")} | {"train/2.png": png(size=(40, 30))})
    for split in ("train", "test"):
        with pytest.raises(DataError, match=rf"2 of 3 images cannot be read: train/{name} \(.*{reason}.*, test/{name}"):
            load_images(path, split)


@pytest.mark.parametrize("size", [5, 8, 24])
def test_size_takes_the_middle_of_any_image(make, size):
    # A square in the middle of a bright frame: what is kept is the square alone, whatever the frame.
    def framed(width, height, value):
        image = np.full((height, width), 255, np.uint8)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        image[top : top + side, left : left + side] = value
        return encoded(Image.fromarray(image))

    data = load_images(
        make({f"{i}.png": framed(*shape, 60) for i, shape in enumerate([(16, 16), (8, 40), (101, 11), (8, 8)])}),
        "train",
        ImageSettings(size=size),
    )
    assert data.spec.image_shape == (1, size, size)
    edge = math.ceil(2 * max(1, size / 8))  # the bicubic filter sees two pixels further, of the larger grid
    assert set(data.images[..., edge:-edge, edge:-edge].flatten().tolist()) == {60}


def test_an_image_of_the_size_stays_as_it_is(make):
    content = png(size=(8, 8))
    assert torch.equal(pixels_of(make, content, size=8), decoded(content))


def test_size_is_antialiased(make):
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    pixels = pixels_of(make, encoded(Image.fromarray(stripes)), size=8)
    inside = pixels[..., 1:-1].int()
    assert int((2 * inside - 255).abs().max()) <= 2  # 127 or 128, or one more by rounding twice


def test_a_large_photo_is_shrunk_as_if_decoded_in_full(make):
    y, x = np.mgrid[:480, :640]
    photo = np.stack([127 + 120 * np.sin(x / 37), 127 + 120 * np.cos(y / 23), (x + y) / 5], axis=-1).astype(np.uint8)
    image = Image.fromarray(photo)
    content = encoded(image, "JPEG", quality=95)
    pixels = pixels_of(make, content, "1.jpg", size=32)
    expected = np.asarray(ImageOps.fit(Image.open(io.BytesIO(content)), (32, 32), Image.Resampling.BICUBIC))
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 4
