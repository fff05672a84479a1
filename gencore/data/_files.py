"""Data sets that are larger than memory: images are decoded when they are asked for, in any process.

What is decoded is kept up to a limit, for the first images of the set, in memory that all processes of a training
share. An epoch asks for every image once, so that it does not matter which are kept, and nothing is ever thrown away.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencore.data._columns import Block, Column, Shape, Strings, Windowed, byte_ends
from gencore.data._pixels import BadImageError, Fit, decoded, reason_of
from gencore.data._sources import Files
from gencore.data.base import DataError
from gencore.data.memory import ColumnDataset
from gencore.noise import Key
from gencore.spec import Batch
from gencore.text import counted, listed, shown

# The states of an image.
_KEPT, _BAD = 1, 2

# Files whose content is part of a fingerprint.
_SAMPLED = 64


class SharedBytes:
    """Zeros that processes share which are forked from here, and on Linux those that are spawned.

    Attributes:
        tensor: (size,) uint8.
        shared: False in a process that has a copy of its own.
    """

    def __init__(self, size: int):
        self._size, self.shared = size, True
        # A file without a place: unlike /dev/shm, it is not limited to the 64 MB that containers have there.
        self._descriptor = os.memfd_create("gencore") if hasattr(os, "memfd_create") else None
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, size)
        self._map()

    def _map(self) -> None:
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)
        if self._size == 0:
            self.tensor = torch.empty(0, dtype=torch.uint8)
            return
        memory = mmap.mmap(-1 if self._descriptor is None else self._descriptor, self._size)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def __getstate__(self) -> dict[str, Any]:
        if self._descriptor is None or get_spawning_popen() is None:
            return {"size": self._size, "descriptor": None}
        return {"size": self._size, "descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._size, descriptor = state["size"], state["descriptor"]
        self.shared = descriptor is not None
        self._descriptor = None if descriptor is None else descriptor.detach()
        self._map()


class BadPictureError(Exception):
    """A picture cannot be decoded.

    Attributes:
        column, index: which one.
        name: of its file.
        reason: why.
    """

    def __init__(self, column: FileColumn, index: int, reason: str):
        super().__init__(reason)
        self.column, self.index, self.name, self.reason = column, index, column.names[index], reason


class FileColumn(Windowed):
    """Pictures that are decoded from their files.

    Args:
        shape: of what is read of each.
        sizes: (N, 2), heights and widths as ``fit`` makes them.
        files: opens them.
        names: the file of each.
        lengths: (N,), the bytes of each.
        fit: how they are resized.
        limit: bytes of pixels that are kept.
    """

    def __init__(
        self,
        shape: Shape,
        sizes: np.ndarray,
        files: Files,
        names: Sequence[str],
        lengths: np.ndarray,
        fit: Fit,
        limit: int,
    ):
        super().__init__(shape, sizes)
        self.files, self.names, self.lengths, self.fit = files, Strings(names), lengths, fit
        ends = byte_ends(shape[0], sizes)
        self._kept = int(np.searchsorted(ends, limit, side="right"))
        self._pixels = SharedBytes(int(ends[self._kept - 1]) if self._kept else 0)
        self._states = SharedBytes(len(sizes))
        self._block = Block(shape[0], sizes, self._pixels.tensor)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_block"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._pixels.shared:
            # A copy of the memory in each process is more than the limit allows.
            self._kept = 0
        self._block = Block(self.shape[0], self.sizes, self._pixels.tensor)

    def picture(self, index: int) -> Tensor:
        keep = index < self._kept
        if keep and self._states.tensor[index] == _KEPT:
            return self._block.view(index)
        name, (height, width) = self.names[index], self.sizes[index].tolist()
        try:
            with self.files.open(name) as stream:
                pixels = decoded(stream, name, self.shape[0], self.fit, (height, width))
        except BadImageError as error:
            raise BadPictureError(self, index, str(error)) from error
        except MemoryError:
            raise
        except Exception as error:
            # The system's errors, and those of damaged archives, which are of many kinds.
            raise BadPictureError(self, index, reason_of(error)) from error
        picture = torch.from_numpy(pixels.copy())
        if keep:
            self._block.view(index).copy_(picture)
            # Only now, so that no other process takes what is half written. Two that decode it write the same.
            self._states.tensor[index] = _KEPT
        return picture

    def mark_bad(self, index: int) -> None:
        self._states.tensor[index] = _BAD

    @property
    def bad(self) -> Tensor:
        """(N,) bool: those that any process found to be bad."""
        return self._states.tensor == _BAD


class FileImages(ColumnDataset):
    """Images, and images that are conditions, that are decoded when they are asked for.

    Arguments are those of :class:`gencore.data.memory.ColumnDataset`, with columns that are :class:`FileColumn`, and:

    Args:
        where: what messages begin with.
        skip_bad: an image that turns out to be bad is replaced, with all its conditions, by the next one that is not.
            Else it is an error.
    """

    workers = True

    def __init__(
        self,
        *arguments: Any,
        where: str,
        skip_bad: bool,
        conditions: Mapping[str, Column | Sequence[str]],
        **options: Any,
    ):
        kept = {n: v if isinstance(v, Column) else Strings(v) for n, v in conditions.items()}
        super().__init__(*arguments, conditions=kept, **options)
        self._where, self._skip_bad = where, skip_bad

    @property
    def notes(self) -> tuple[str, ...]:
        """What was said at first, and what processes that share the memory found since."""
        found = {column.names[i]: "" for column in self._columns() for i in column.bad.nonzero()[:, 0].tolist()}
        if not found:
            return self._notes
        what = counted(len(found), "image that cannot be decoded", "images that cannot be decoded")
        return (*self._notes, f"replaced {what}: {listed(found)}")

    def batch(self, indices: Tensor, key: Key | None = None) -> Batch:
        """As :meth:`gencore.data.memory.ColumnDataset.batch`.

        Raises:
            DataError: an image cannot be decoded; the message names it.
        """
        while True:
            try:
                return super().batch(indices, key)
            except BadPictureError as error:
                if not self._skip_bad:
                    raise DataError(
                        f"{self._where}: {shown(error.name)} cannot be read: {error.reason}; "
                        "--set data.skip_bad=true puts another image in its place",
                        [error.name],
                    ) from error
                error.column.mark_bad(error.index)

    def _usable(self, columns: Sequence[Column | Sequence[str]], indices: Tensor) -> Tensor:
        bad = torch.stack([column.bad for column in columns if isinstance(column, FileColumn)]).any(0)
        if not bad.any():
            return indices
        good = (~bad).nonzero()[:, 0]
        if not len(good):
            raise DataError(f"{self._where}: no image can be decoded")
        # The first good one from each index on, and from the beginning after the last.
        return good[torch.searchsorted(good, indices) % len(good)]

    def _columns(self) -> list[FileColumn]:
        columns = [self._images, *self._conditions.values(), *self._unpaired.values()]
        return [column for column in columns if isinstance(column, FileColumn)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what can be known without decoding: names and sizes of the files, labels and texts, how images are
        resized, and the content of some of the files."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.spec, len(self))).encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().astype("<i8").tobytes())
        for values in self._conditions.values():
            if not isinstance(values, Column):
                digest.update(repr(tuple(values)).encode())
        for column in self._columns():
            digest.update(repr((column.fit, tuple(column.names))).encode())
            digest.update(column.lengths.astype("<i8").tobytes())
            for i in sorted({i * len(column) // _SAMPLED for i in range(_SAMPLED)}):
                # What cannot be read is known by its name alone; whoever asks for it gets the error.
                try:
                    with column.files.open(column.names[i]) as stream:
                        digest.update(hashlib.blake2b(stream.read()).digest())
                except Exception as error:
                    digest.update(type(error).__name__.encode())
        return digest.hexdigest()
