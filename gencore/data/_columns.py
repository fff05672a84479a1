"""Columns of pictures: what a data set takes its images from, and those that are conditions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int, int]

# Pixels are gone through in pieces of about this many bytes.
_PIECE = 1 << 24


class Column:
    """N pictures of uint8 pixels, of which windows of one shape are read."""

    shape: Shape

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, indices: Tensor, places: Tensor | None) -> Tensor:
        """The pictures at ``indices`` (B,) int64, as (B, *shape) uint8.

        Args:
            places: (B, 2) in [0, 1): where the window lies, from the top to the bottom and from the left to the right,
                in pictures that are larger than it; in the middle without it.
        """
        raise NotImplementedError

    def pieces(self) -> Iterator[Tensor]:
        """All that is in memory, in their order, a few at a time; sizes too, where they differ."""
        raise NotImplementedError


class Held(Column):
    """Pictures of one shape in memory: ``pixels`` (N, C, H, W) uint8."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels
        channels, height, width = pixels.shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Tensor, places: Tensor | None) -> Tensor:
        return self.pixels[indices]

    def pieces(self) -> Iterator[Tensor]:
        yield from self.pixels.split(max(1, _PIECE // self.pixels[0].numel()))


class Windowed(Column):
    """Pictures of sizes of their own, whose windows are read; a subclass says how to get at one, by :meth:`picture`.

    Args:
        shape: of the windows.
        sizes: (N, 2), the heights and widths of the pictures, each at least that of the window.
    """

    def __init__(self, shape: Shape, sizes: np.ndarray):
        self.shape = shape
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def picture(self, index: int) -> Tensor:
        """The picture (C, h, w), uint8."""
        raise NotImplementedError

    def read(self, indices: Tensor, places: Tensor | None) -> Tensor:
        pixels = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        height, width = self.shape[1:]
        for row, index in enumerate(indices.tolist()):
            picture = self.picture(index)
            spare = (picture.shape[1] - height, picture.shape[2] - width)
            if places is None:
                top, left = spare[0] // 2, spare[1] // 2
            else:
                # The rounded product is below the number of places: they are multiples of 2^-24, in float64.
                top, left = (int(place * (more + 1)) for place, more in zip(places[row].tolist(), spare, strict=True))
            pixels[row] = picture[:, top : top + height, left : left + width]
        return pixels


class Block:
    """Memory for pictures (C, h, w) of known sizes, one behind the other.

    Args:
        channels: of every picture.
        sizes: (N, 2), their heights and widths.
        pixels: the memory itself, a flat uint8 tensor for the first of them at least.
    """

    def __init__(self, channels: int, sizes: np.ndarray, pixels: Tensor):
        self.channels, self.sizes, self.pixels = channels, sizes, pixels
        self._ends = byte_ends(channels, sizes)

    def view(self, index: int) -> Tensor:
        """The picture of this index, as a view."""
        height, width = self.sizes[index].tolist()
        end = int(self._ends[index])
        flat = self.pixels[end - self.channels * height * width : end]
        return flat.view(self.channels, height, width)


def byte_ends(channels: int, sizes: np.ndarray) -> np.ndarray:
    """Where each picture ends, in bytes from the beginning of the first."""
    return channels * np.cumsum(sizes.astype(np.int64).prod(axis=1))


class Ragged(Windowed):
    """Pictures of sizes of their own, all in memory."""

    def __init__(self, shape: Shape, block: Block):
        super().__init__(shape, block.sizes)
        self.block = block

    def picture(self, index: int) -> Tensor:
        return self.block.view(index)

    def pieces(self) -> Iterator[Tensor]:
        yield torch.from_numpy(self.sizes.astype("<i8"))
        yield from self.block.pixels.split(_PIECE)


class Strings(Sequence[str]):
    """Many strings in two arrays: processes that are forked share them, where each would copy Python's own as it reads
    them, and they take a fraction of the memory."""

    def __init__(self, strings: Iterable[str]):
        # Names that are no UTF-8 hold surrogates.
        parts = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._bytes = np.frombuffer(b"".join(parts), np.uint8)
        self._ends = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first = index % len(self)
        return self._bytes[self._ends[first] : self._ends[first + 1]].tobytes().decode("utf-8", "surrogatepass")
