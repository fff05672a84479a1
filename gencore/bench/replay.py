"""Calls in a CUDA graph, over buffers that take turns: what a replay takes is the GPU's time alone.

One by one, calls of some microseconds measure Python. And the same tensors, again and again, lie in the GPU's cache,
where they seldom lie in a network: so a graph has calls with inputs and outputs of their own, until these are more than
the cache holds, or are as many as small tensors are worth.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gencore.bench.measure import Timing, interleave

Call = Callable[[], Any]
# A replay takes about as long, if that is not more calls; shorter ones follow each other until they do.
_SECONDS, _MOST_CALLS = 1e-3, 256
# More copies of small tensors than that cost more to make than they tell.
_MOST_COPIES = 32
# What is read or written between two calls with the same tensors, in sizes of the cache.
_CACHES = 2


def copies(nbytes: int, cache: int) -> int:
    """How many sets of tensors of ``nbytes`` take turns on a GPU with so large a cache."""
    return max(1, min(_MOST_COPIES, math.ceil(_CACHES * cache / max(1, nbytes))))


def cache_bytes() -> int:
    """The size of the current GPU's last-level cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


class Graph:
    """Calls in turn, captured; calling it replays them.

    Attributes:
        calls: how many a replay has.
    """

    def __init__(self, calls: Sequence[Call], repeats: int):
        self.calls = repeats * len(calls)
        # Results are kept until their turn comes again, so that they do not take each other's memory.
        kept: collections.deque[Any] = collections.deque(maxlen=len(calls))

        def run() -> None:
            for _ in range(repeats):
                for call in calls:
                    kept.append(call())

        self._replay = _captured(run, warm_up=calls)
        self._kept = kept

    def __call__(self) -> None:
        self._replay()


def _captured(run: Call, warm_up: Sequence[Call]) -> Call:
    # As PyTorch asks: on a stream of their own the calls load what they need before the capture.
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for call in warm_up:
            call()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except BaseException:
        # A capture that fails leaves its stream the current one, and the generator waiting for its end, which it is
        # told of by one that succeeds.
        torch.cuda.set_stream(before)
        torch.cuda.synchronize()
        one = torch.zeros(1, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            one.add_(1)
        raise
    return graph.replay


def timings(
    candidates: Mapping[str, Sequence[Call]], *, rounds: int, budget: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """What a call of each candidate takes, replayed in turn with the others; and why some cannot be captured.

    Args:
        candidates: of each a call for every set of tensors.
        rounds, budget: as :func:`gencore.bench.measure.interleave` takes them.
    """
    graphs: dict[str, Graph] = {}
    failures: dict[str, str] = {}
    for name, calls in candidates.items():
        try:
            # A call alone on an idle GPU would tell what the host takes.
            once = Graph(calls, 1)
            taken = interleave({name: once}, rounds=3, round_seconds=_SECONDS, device="cuda", budget=0.0)[name].median
            repeats = min(round(_SECONDS / max(taken, 1e-7)), _MOST_CALLS // len(calls))
            graphs[name] = Graph(calls, repeats) if repeats > 1 else once
        except RuntimeError as error:
            failures[name] = f"a CUDA graph cannot have it: {error}"
    found = interleave(graphs, rounds=rounds, round_seconds=_SECONDS, device="cuda", budget=budget) if graphs else {}
    return {
        name: Timing(tuple(seconds / graphs[name].calls for seconds in timing.seconds))
        for name, timing in found.items()
    }, failures
