"""Image files for tests."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RNG = np.random.default_rng(0)


def png(mode: str = "RGB", size: tuple[int, int] = (4, 3), value: Any = None) -> bytes:
    """A PNG of random pixels, or of one value."""
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    pixels = RNG.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    return encoded(Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels, mode))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def decoded(content: bytes) -> Tensor:
    """The pixels (3, H, W) of a file's content."""
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).copy()).permute(2, 0, 1)


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    """The files {name: content} below ``path``; a name that ends in a slash is an empty folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (path / name).mkdir(exist_ok=True)
        else:
            (path / name).write_bytes(content)
    return path


def write_archive(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
