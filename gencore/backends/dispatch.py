"""Which of several backends runs an op on a GPU: a table per op, of what was measured or, until then, is expected.

``tables/<op>.json`` has an entry for each kind of GPU, type and direction. An entry has rows: the features of a problem
that was measured, and who runs it, the fastest first. A call takes the row that is nearest to it. Features are those of
one sample, so that the batch that a sample is in does not change its bits. ``make dispatch`` writes the entries from
the results of benchmarks; where there is no entry, the first backend that serves the device runs the op.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gencore._ops import OPS
from gencore._ops import Direction as Direction
from gencore.backends.layout import memory_format_of

# The backends, and PyTorch's own kernels for attention: see handover.py.
Runner = Literal["cuda", "triton", "cudnn", "flash"]
RUNNERS: tuple[Runner, ...] = get_args(Runner)
FOLDER = Path(__file__).parent / "tables"


class Kernel(NamedTuple):
    """A kernel's table and direction, and which of its arguments says what the problem is."""

    op: str
    direction: Direction
    main: int = 0


# By the names that the library knows them by; those that some backends do without have no tables.
KERNELS = {
    kernel.name: Kernel(kernel.table or op.stem, kernel.direction, kernel.main)
    for op in OPS
    for kernel in op.kernels
    if kernel.direction is not None
}

# Words must be equal, numbers near: how many octaves apart counts.
Features = Mapping[str, str | float]


class Measured(NamedTuple):
    """Where and when the figures of an entry were measured, and with what."""

    gpu: str
    date: str
    commit: str
    torch: str
    triton: str


class Row(NamedTuple):
    """A problem, and who runs it, the fastest first. ``seconds``: of each that was measured."""

    features: Features
    order: tuple[Runner, ...]
    seconds: Mapping[str, float] = {}


class Entry(NamedTuple):
    """What is known of an op on GPUs of a compute capability, for a type and a direction.

    ``dtype`` is "float32" or "bfloat16"; the latter is for float16 too, whose kernels differ in conversions alone.
    ``measured`` is None where the rows are expectations, and ``why`` then says what they rest on.
    """

    capability: tuple[int, int]
    dtype: str
    direction: Direction
    measured: Measured | None
    why: str
    rows: tuple[Row, ...]

    @property
    def source(self) -> str:
        """What the rows rest on, in words."""
        if self.measured is None:
            return f"not measured: {self.why}"
        return f"measured on {self.measured.gpu}, {self.measured.date}"


def read(op: str, folder: Path = FOLDER) -> tuple[Entry, ...]:
    """The entries of an op; none where there is no table of it."""
    path = folder / f"{op}.json"
    if not path.exists():
        return ()
    return tuple(
        Entry(
            (told["capability"][0], told["capability"][1]),
            told["dtype"],
            told["direction"],
            None if told["measured"] is None else Measured(**told["measured"]),
            told["why"],
            tuple(Row(row["features"], tuple(row["order"]), row.get("seconds", {})) for row in told["rows"]),
        )
        for told in json.loads(path.read_text(encoding="utf-8"))["entries"]
    )


_read = functools.cache(read)


def has_table(kernel: str) -> bool:
    """Whether anything is known of a kernel's op, on any GPU."""
    return kernel in KERNELS and bool(_read(KERNELS[kernel].op))


_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "bfloat16"}


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; (0, 0), of which nothing is known, of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@functools.cache
def entry_of(op: str, direction: Direction, capability: tuple[int, int], dtype: torch.dtype) -> Entry | None:
    """The entry for a GPU: its own, or that of the GPU of its generation that is nearest; None where there is none."""
    found = [
        entry
        for entry in _read(op)
        if entry.direction == direction and entry.dtype == _DTYPES.get(dtype) and entry.capability[0] == capability[0]
    ]
    return min(found, key=lambda entry: abs(entry.capability[1] - capability[1]), default=None)


def nearest(entry: Entry, features: Features) -> Row:
    """The row of an entry that is most like a problem; of several the first."""
    return min(entry.rows, key=lambda row: _distance(row.features, features))


def _distance(a: Features, b: Features) -> float:
    distance = 0.0
    for name, value in a.items():
        other = b[name]
        if isinstance(value, str) or isinstance(other, str):
            # More than numbers can be apart.
            distance += 0.0 if value == other else 1e3
        else:
            distance += abs(math.log2(max(value, 1)) - math.log2(max(other, 1)))
    return distance


@functools.lru_cache(4096)
def _row(op: str, direction: Direction, capability: tuple[int, int], dtype: torch.dtype, features: Any) -> Row | None:
    entry = entry_of(op, direction, capability, dtype)
    if entry is None:
        return None
    row = nearest(entry, dict(features))
    if row.features.get("size") == dict(features).get("size"):
        return row
    # PyTorch's kernels are made for some head sizes; what they do with others no row says.
    return row._replace(order=tuple(runner for runner in row.order if runner not in ("cudnn", "flash")))


def row_of(kernel: str, capability: tuple[int, int], args: Sequence[Any]) -> Row | None:
    """The row for a call of a kernel with these arguments; None where nothing is known."""
    op, direction, main = KERNELS[kernel]
    return _row(op, direction, capability, args[main].dtype, tuple(features_of(kernel, args).items()))


def entry_of_call(kernel: str, capability: tuple[int, int], args: Sequence[Any]) -> Entry | None:
    """The entry that the row for such a call is in."""
    op, direction, main = KERNELS[kernel]
    return entry_of(op, direction, capability, args[main].dtype)


def features_of(kernel: str, args: Sequence[Any]) -> dict[str, str | int]:
    """What the tables go by of a call of a kernel with these arguments."""
    op, _, main = KERNELS[kernel]
    tensor: Tensor = args[main]
    if op in ("attention", "general_attention"):
        return attention_features(tensor.shape[3], tensor.shape[2], args[main + 1].shape[2])
    if op == "group_norm":
        return group_norm_features(tensor.shape, layout_of(tensor))
    return sample_features(tensor.shape, layout_of(tensor))


def attention_features(size: int, queries: int, keys: int) -> dict[str, str | int]:
    """What attention's table goes by: the channels of a head, and the tokens of the shorter side."""
    return {"size": size, "tokens": min(queries, keys)}


def group_norm_features(shape: Sequence[int], layout: str) -> dict[str, str | int]:
    """What group norm's table goes by: the memory format, the channels, and the pixels of each."""
    return {"layout": layout, "channels": shape[1], "pixels": math.prod(shape[2:])}


def sample_features(shape: Sequence[int], layout: str) -> dict[str, str | int]:
    """What the table of an op goes by that treats each value alike: the memory format, and the values of a sample."""
    return {"layout": layout, "values": math.prod(shape[1:])}


def layout_of(tensor: Tensor) -> str:
    """The memory format, as rows name it."""
    return "contiguous" if memory_format_of(tensor) is torch.contiguous_format else "channels_last"
