"""Where a step of training or sampling spends its time, by families of operations: with PyTorch's, and with ours.

The totals are measured without a profiler, before and after in turns. The profiler, which costs time itself, says only
how they are divided: what runs belongs to the outermost operation around it that is known, a gradient to the operation
that it is the gradient of, and the rest of the step, in which no operation runs, to Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import statistics
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from gencore import ops
from gencore._ops import op_of
from gencore.bench import plain
from gencore.bench.machine import commit, describe, versions
from gencore.bench.measure import interleave, median_interval, quiet_profiler
from gencore.config import ConfigError
from gencore.data import NamedDataset
from gencore.files import write_atomically
from gencore.models.base import GenerativeModel
from gencore.noise import Key
from gencore.spec import Batch, Conditions
from gencore.train import Trainer

CONVOLUTION = "convolution"
PRODUCT = "matrix product"
ATTENTION = "attention"
NORM = "norm, activation"
NOISE = "noise, diffusion, VAE"
ELEMENTWISE = "elementwise, copies"
OPTIMISER = "optimiser"
PYTHON = "data, Python"
OTHER = "other"
FAMILIES = (CONVOLUTION, PRODUCT, ATTENTION, NORM, NOISE, ELEMENTWISE, OPTIMISER, PYTHON, OTHER)

FORMAT, VERSION = "gencore profile", 1
_SAMPLING_STEPS = 10
# The profiler sees the two sides in turns, so often; after the first time, calls of about so many events, each of which
# takes it 40 microseconds to read, but no more calls than that.
_SESSIONS, _EVENTS, _MOST_CALLS = 5, 20_000, 20
# What stands in a profile for a step, its data, and each call of an op.
STEP, _DATA, _OP = "gencore.step", "gencore.data", "gencore.op "
# aten's names without "aten::", the "_" of what works in place, and "_backward".
_ATEN = {
    PRODUCT: "linear matmul mm bmm addmm _addmm_activation baddbmm addbmm mv addmv dot einsum mkldnn_linear",
    NORM: "group_norm native_group_norm batch_norm native_batch_norm cudnn_batch_norm _batch_norm_impl_index "
    "layer_norm native_layer_norm instance_norm rms_norm",
    NOISE: "randn rand randn_like rand_like randint randperm normal uniform bernoulli random dropout native_dropout",
    OPTIMISER: "linalg_vector_norm",
    ELEMENTWISE: "add sub rsub mul div neg abs exp expm1 log log1p log_sigmoid log_sigmoid_forward sqrt rsqrt square "
    "pow reciprocal sigmoid silu relu gelu tanh elu softplus leaky_relu hardtanh threshold clamp clamp_min clamp_max "
    "minimum maximum where lerp addcmul addcdiv sin cos erf special_ndtr floor ceil round trunc sign lt le gt ge eq ne "
    "logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not isfinite isinf isnan nan_to_num masked_fill "
    "fill zero zeros zeros_like ones ones_like full full_like copy clone contiguous to _to_copy sum mean std var amax "
    "amin max min norm logsumexp logaddexp softmax _softmax log_softmax _log_softmax all any cumsum mse_loss l1_loss "
    "smooth_l1_loss binary_cross_entropy binary_cross_entropy_with_logits cat stack pad constant_pad_nd flip roll "
    "upsample_nearest2d upsample_bilinear2d interpolate avg_pool2d max_pool2d adaptive_avg_pool2d index "
    "select_backward gather scatter embedding embedding_dense index_select repeat expand_as",
}
_BY_NAME = {name: family for family, names in _ATEN.items() for name in names.split()}
_BY_PREFIX = (
    (("conv", "_conv", "mkldnn_conv", "cudnn_conv", "slow_conv", "thnn_conv"), CONVOLUTION),
    (("scaled_dot_product", "_scaled_dot_product", "_flash_attention", "_efficient_attention"), ATTENTION),
    (("_foreach_", "_fused_"), OPTIMISER),
)


@dataclass(frozen=True)
class Side:
    """A step with one kind of operations.

    Attributes:
        seconds: of the step, the median of the rounds, without the profiler.
        interval: of that median, 95%, by bootstrap over the rounds.
        families: seconds of each of :data:`FAMILIES`; their sum is ``seconds``.
    """

    seconds: float
    interval: tuple[float, float]
    families: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """A step with PyTorch's operations and with ours.

    Attributes:
        before, after: with :mod:`gencore.bench.plain`, and with ours.
        ratio: how many times as long the step takes before: the median of the ratios round by round.
        ratio_interval: of that median, 95%, by bootstrap over the rounds.
        rounds: in which both were timed in turn.
    """

    before: Side
    after: Side
    ratio: float
    ratio_interval: tuple[float, float]
    rounds: int

    @property
    def families(self) -> tuple[str, ...]:
        """Those that take part."""
        return tuple(name for name in FAMILIES if self.before.families[name] or self.after.families[name])

    def write(self, path: Path | str, **about: Any) -> None:
        """Writes it as JSON, with ``about``, what was profiled, and the machine; whole or not at all."""
        told = {
            "format": FORMAT,
            "version": VERSION,
            "commit": commit(),
            "machine": describe(str(about.get("device", "cpu"))),
            "versions": versions(),
            **about,
            **dataclasses.asdict(self),
        }
        write_atomically(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def profile(
    step: Callable[[], object],
    *,
    device: str = "cpu",
    parts: int = 1,
    rounds: int = 21,
    budget: float = 30.0,
) -> Profile:
    """Times a step with PyTorch's operations and with ours, in turns, and divides each among the families.

    Args:
        step: it must not change which operations a later call makes. What it draws from torch's generators is undone.
        device: "cpu" or "cuda", on which it runs.
        parts: how many equal steps one call makes; what is told is of one.
        rounds: how often each is timed.
        budget: seconds that all rounds may take together, as far as five take less.
    """

    def before() -> None:
        with plain.operations():
            step()

    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        timings = interleave({"before": before, "after": step}, rounds=rounds, device=device, budget=budget)
        divided: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        calls = 1
        for _ in range(_SESSIONS):
            with plain.operations():
                divided["before"] += _divided(step, calls, device)[0]
            seconds, events = _divided(step, calls, device)
            divided["after"] += seconds
            calls = max(1, min(_MOST_CALLS, _EVENTS * calls // events))
    sides = {}
    for name, timing in timings.items():
        # Family by family the median, which what disturbs a call does not move.
        shares = {family: statistics.median(call[family] for call in divided[name]) for family in FAMILIES}
        families = {family: part / parts for family, part in _scaled(shares, timing.median, device).items()}
        low, high = timing.interval
        sides[name] = Side(timing.median / parts, (low / parts, high / parts), families)
    ratios = timings["after"].ratios_of(timings["before"])
    return Profile(
        before=sides["before"],
        after=sides["after"],
        ratio=statistics.median(ratios),
        ratio_interval=median_interval(ratios),
        rounds=len(ratios),
    )


def training_step(trainer: Trainer) -> Callable[[], None]:
    """All that a step of training does, for every phase: data, losses, gradients, optimiser; nothing is written."""
    if not isinstance(trainer.data, _Marked):
        trainer.data = _Marked(trainer.data)
    trainer.model.train()
    return trainer.advance


def sampling_step(model: GenerativeModel, n: int, conditions: Conditions) -> tuple[Callable[[], Tensor], int]:
    """Sampling ``n`` images, and the number of steps that it takes of a sampler; 1 for a model that knows none.

    Where the model's settings of sampling have ``steps``, there are ten of them at most: each does the same.
    """
    steps, sampling = 1, model.sampling
    if sampling is not None and hasattr(sampling, "steps"):
        steps = _SAMPLING_STEPS if sampling.steps is None else min(sampling.steps, _SAMPLING_STEPS)
        try:
            fewer = type(sampling).from_dict({**sampling.to_dict(), "steps": steps})
            model.sample(1, Key(0), {name: values[:1] for name, values in conditions.items()}, sampling=fewer)
            sampling = fewer
        except ConfigError:  # The model has fewer.
            steps = 1
    model.eval()
    return lambda: model.sample(n, Key(0), conditions, sampling=sampling), steps


class _Marked(NamedDataset):
    """A data set whose batches are seen in a profile."""

    def __init__(self, data: NamedDataset):
        super().__init__(data.name, data.split, data.spec, data.notes)
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, key: Key | None = None) -> Batch:
        with torch.profiler.record_function(_DATA):
            return self.data.batch(indices, key)


def _divided(step: Callable[[], object], calls: int, device: str) -> tuple[list[dict[str, float]], int]:
    """Seconds of each call by family, as the profiler sees them, and the number of events that it saw.

    On a GPU they are its own, without what it waits.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    session = torch.profiler.profile(activities=activities)
    with quiet_profiler(), _marked_ops(), session as profiler, _unobserved(device):
        # The first one is not looked at: the profiler, too, has to warm up.
        for _ in range(1 + calls):
            with torch.profiler.record_function(STEP):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
    events = profiler.events()
    return by_family(events, device)[1:], len(events)


def by_family(events: Iterable[Any], device: str = "cpu") -> list[dict[str, float]]:
    """Seconds by family of each step in the events of a profile; every event's own time is in exactly one family.

    A step is what runs within ``record_function(STEP)``; on a GPU, also what other threads do meanwhile.
    """
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    on_cpu.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    begins = [event.time_range.start for event in on_cpu if event.name == STEP]
    found = [dict.fromkeys(FAMILIES, 0.0) for _ in begins]
    families: dict[int, str | None] = {}
    inside: set[int] = set()
    creators: dict[tuple[int, int], str | None] = {}
    for event in on_cpu:
        parent = event.cpu_parent
        family = families.get(id(parent)) if parent is not None else None
        if family is None:
            family = _family(event, creators)
        families[id(event)] = family
        if event.name == STEP or (parent is not None and id(parent) in inside):
            inside.add(id(event))
        if event.sequence_nr >= 0 and not _is_of_backward(event.name):
            # An operation tells the number of the next node of the graph: of several, the last one makes it.
            creators[event.thread, event.sequence_nr] = family
        number = bisect(begins, event.time_range.start) - 1
        if device == "cuda" and number >= 0:
            found[number][family or OTHER] += event.self_device_time_total / 1e6
        elif id(event) in inside:
            found[number][PYTHON if event.name == STEP else family or OTHER] += event.self_cpu_time_total / 1e6
    return found


def _family(event: Any, creators: dict[tuple[int, int], str | None]) -> str | None:
    """That of an event by itself, if it is known."""
    name: str = event.name
    if "AccumulateGrad" in name or name.startswith("Optimizer."):
        return OPTIMISER
    if name == _DATA:
        return PYTHON
    if name.startswith(_OP):
        return _family_of(name.removeprefix(_OP))
    if _is_of_backward(name):
        made_by = creators.get((event.fwd_thread, event.sequence_nr))
        return made_by or _of_node(name)
    if name.startswith("gencore::"):
        return _family_of(name.removeprefix("gencore::"))
    return _of_aten(name.removeprefix("aten::")) if name.startswith("aten::") else None


def _family_of(name: str) -> str:
    """Of one of our ops."""
    op = op_of(name)
    return NOISE if op is None else op.family


def _is_of_backward(name: str) -> bool:
    return name.startswith("autograd::engine::evaluate_function") or re.search(r"Backward\d*$", name) is not None


def _of_node(name: str) -> str | None:
    """The family of a node of the graph by its name, such as ConvolutionBackward0."""
    if match := re.search(r"_gencore_(\w+?)_default", name):
        return _family_of(match[1])
    stem = re.sub(r"Backward\d*$", "", name.rsplit(" ", 1)[-1])
    return _of_aten(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower())


def _of_aten(name: str) -> str | None:
    name = name.removesuffix("_").removesuffix("_backward")
    if name in _BY_NAME:
        return _BY_NAME[name]
    return next((family for prefixes, family in _BY_PREFIX if name.startswith(prefixes)), None)


def _scaled(seconds: dict[str, float], total: float, device: str) -> dict[str, float]:
    """The seconds, brought to the total that was measured without the profiler."""
    if device == "cuda":
        # The profiler does not slow the GPU; while it does nothing, it waits for Python.
        seconds = {**seconds, PYTHON: max(0.0, seconds[PYTHON] + total - sum(seconds.values()))}
    factor = total / sum(seconds.values())
    return {name: spent * factor for name, spent in seconds.items()}


@contextlib.contextmanager
def _marked_ops() -> Iterator[None]:
    """Every call ``ops.name(...)`` is seen in a profile, whether the ops are ours or plain."""

    def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(_OP + name):
                return function(*args, **kwargs)

        return call

    unmarked = {name: getattr(ops, name) for name in plain.NAMES}
    try:
        for name, function in unmarked.items():
            setattr(ops, name, marked(name, function))
        yield
    finally:
        for name, function in unmarked.items():
            setattr(ops, name, function)


@contextlib.contextmanager
def _unobserved(device: str) -> Iterator[None]:
    """Our ops call their kernels as they do where no profiler looks, on the processor.

    Under a profiler they take PyTorch's dispatcher, which takes many times as long as it does otherwise and would be
    told as the kernels' time. A GPU's times do not depend on that, and without the dispatcher would belong to no op.
    """
    module: Any = torch.autograd.profiler
    if device == "cuda" or not hasattr(module, "_is_profiler_enabled"):
        yield
        return
    before = module._is_profiler_enabled
    module._is_profiler_enabled = False
    try:
        yield
    finally:
        module._is_profiler_enabled = before
