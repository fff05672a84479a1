"""What a run of the benchmarks found, and its JSON file, which later runs are compared with.

Every figure is in SI units: seconds, bytes, operations (a multiplication and an addition count as two).
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from gencore.files import write_atomically

FORMAT = "gencore-bench"
VERSION = 1
OURS = "ours"

_EVEN = 0.02

Interval = tuple[float, float]
Section = Literal["ops", "networks", "end to end"]
Verdict = Literal["faster", "even", "slower"]


class ReportError(ValueError):
    """A file that should be a report and is none, or one of another version."""


def positive(value: float | None) -> TypeGuard[float]:
    """Whether a figure was measured and can stand on a logarithmic axis."""
    return value is not None and math.isfinite(value) and value > 0


@dataclass(frozen=True)
class Candidate:
    """What was measured of ours, or of one peer. None stands for what was not measured, or does not apply.

    Attributes:
        name: "ours", or the peer's; what begins with "ours" is another way to run ours.
        seconds: of one call, the median of the rounds.
        interval: of that median, 95%, by bootstrap over the rounds.
        ratio: how many times as long as ours it takes, the median of the ratios round by round; 1 for ours.
        ratio_interval: of that ratio, 95%, by bootstrap over the rounds.
        peak_bytes: of tensors that one call allocates, at their highest, results included.
        call_seconds: of a call with tensors of a few elements, which is all overhead.
        compile_seconds: of the first call, with the compiler's caches empty; for what is compiled.
        error: the largest deviation from the definition in float64, relative to its largest value; of noise, how far
            mean and deviation are from 0 and 1.
        failure: why it could not run, in one line.
    """

    name: str
    seconds: float | None = None
    interval: Interval | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    peak_bytes: int | None = None
    call_seconds: float | None = None
    compile_seconds: float | None = None
    error: float | None = None
    failure: str | None = None

    @property
    def bounds(self) -> Interval:
        """The interval of the ratio; the ratio itself where there is none."""
        low, high = self.ratio_interval or (None, None)
        ratio = self.ratio if positive(self.ratio) else 1.0
        return (low, high) if positive(low) and positive(high) else (ratio, ratio)

    @property
    def verdict(self) -> Verdict:
        """How ours does against this peer, which has a ratio: "even" where its interval reaches to within 2% of 1.

        A smaller difference may be real within a run, and does not survive another one.
        """
        low, high = self.bounds
        return "faster" if low > 1 + _EVEN else "slower" if high < 1 - _EVEN else "even"


@dataclass(frozen=True)
class Result:
    """One benchmark on one case: ours and its peers, and what the machine would allow.

    Attributes:
        section: "ops"; "networks", whole ones; or "end to end", steps of training and sampling.
        op: the op, the network or the model.
        benchmark: what of it, such as "forward and backward".
        case: a label of shape and layout, one of a kind within the benchmark.
        why: what the case is there for.
        presets: the workloads that the case is part of.
        dtype: as torch prints it, without "torch.".
        candidates: ours first.
        nbytes: read and written at least.
        flops: of the formula; an exponential or a root counts as one.
        floor_seconds: what the machine takes at best.
        limit: of what that is the limit.
        tolerance: the error up to which a candidate computes the same.
        clock: what the seconds are of: "calls" that follow each other, or a "graph", replays of a CUDA graph of calls
            whose tensors take turns.
    """

    section: Section
    op: str
    benchmark: str
    case: str
    why: str
    presets: tuple[str, ...]
    dtype: str
    candidates: tuple[Candidate, ...]
    nbytes: int
    flops: int
    floor_seconds: float | None
    limit: str
    tolerance: float | None
    clock: Literal["calls", "graph"] = "calls"

    @property
    def name(self) -> str:
        """One of a kind in a report."""
        return f"{self.op} · {self.benchmark} · {self.case} · {self.dtype}"

    @property
    def ours(self) -> Candidate:
        return self.candidates[0]

    @property
    def peers(self) -> tuple[Candidate, ...]:
        return self.candidates[1:]

    @property
    def share_of_floor(self) -> float | None:
        """The floor over our time: 1 is as fast as the machine allows."""
        if self.floor_seconds is None or not self.ours.seconds:
            return None
        return self.floor_seconds / self.ours.seconds

    @property
    def best_peer(self) -> Candidate | None:
        """The fastest of the peers that compute the same, where ours computes it too; None where there is none."""
        able = [
            (peer.ratio, peer)
            for peer in self.peers
            if positive(peer.ratio) and self.agrees(peer) and not peer.name.startswith(OURS)
        ]
        return min(able, key=lambda pair: pair[0])[1] if able and self.agrees(self.ours) else None

    def agrees(self, candidate: Candidate) -> bool:
        """Whether a candidate computes the same, as far as was looked."""
        return candidate.error is None or self.tolerance is None or candidate.error <= self.tolerance


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured in the same run: on all threads in use, or on the GPU."""

    copy_in_cache: float
    """Bytes read and written per second by a copy within the cache; on a GPU as ``copy_beyond_cache``."""
    copy_beyond_cache: float
    products: dict[str, float]
    """Operations per second of products of matrices, by dtype."""
    normals: float
    """Values of normal noise per second that the instruction issue allows."""


@dataclass(frozen=True)
class Report:
    """A run.

    Attributes:
        date: ISO 8601, UTC.
        commit: of gencore, as git describes it; "unknown" outside of a checkout.
        machine: what it ran on: at least ``name``, ``device`` ("cpu" or "cuda"), ``threads``, ``simd_level``.
        versions: of gencore, Python, torch and every peer that is installed.
        settings: of the run: ``rounds``, ``quick`` and ``complete``, which is false of an interrupted one, among them.
    """

    date: str
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    limits: Limits
    results: tuple[Result, ...]

    def to_json(self) -> str:
        told = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        # Standard JSON has no infinity or NaN; an error may be either.
        return json.dumps(_storable(told), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def write(self, path: Path | str) -> None:
        """Writes the file whole or not at all."""
        write_atomically(path, self.to_json())


def read(path: Path | str) -> Report:
    """The report in a file.

    Raises:
        ReportError: it is no report, or of a version that this gencore does not know.
        OSError: it cannot be read.
    """
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is no JSON: {error}") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ReportError(f"{path} is no report of gencore bench")
    if told.get("version") != VERSION:
        raise ReportError(f"{path} is a report of version {told.get('version')!r}, this gencore reads {VERSION}")
    try:
        return _restored(Report, {k: v for k, v in told.items() if k not in ("format", "version")})
    except (TypeError, KeyError, ValueError) as error:
        raise ReportError(f"{path} is a damaged report: {error}") from None


_WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(wanted: Any, value: Any) -> Any:
    """``value``, as JSON has it, as the type ``wanted``; a TypeError says what does not fit."""
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        if not isinstance(value, dict):
            raise TypeError(f"{wanted.__name__} must be an object, got {type(value).__name__}")
        hints = typing.get_type_hints(wanted)
        if unknown := value.keys() - hints.keys():
            raise TypeError(f"{wanted.__name__} has no {', '.join(sorted(unknown))}")
        return wanted(**{key: _restored(hints[key], item) for key, item in value.items()})
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _restored(next(part for part in parts if part is not type(None)), value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"a list was expected, got {type(value).__name__}")
        inner = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_restored(part, item) for part, item in zip(inner, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"an object was expected, got {type(value).__name__}")
        return {key: _restored(parts[1], item) for key, item in value.items()}
    if origin is Literal:
        if value not in parts:
            raise TypeError(f"one of {', '.join(map(repr, parts))} was expected, got {value!r}")
        return value
    if wanted is float:
        value = _WORDS.get(value, value) if isinstance(value, str) else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"a number was expected, got {value!r}")
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TypeError(f"{wanted.__name__} was expected, got {value!r}")
    return value
