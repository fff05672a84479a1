"""Calls in a CUDA graph, over buffers that take turns: what a replay takes is the GPU's time alone.

One by one, calls of some microseconds measure Python. And the same tensors, again and again, lie in the GPU's cache,
where they seldom lie in a network: so a graph has calls with inputs and outputs of their own, until these are more than
the cache holds.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gencore.bench.measure import Timing, interleave

Call = Callable[[], Any]
# A replay takes about as long, if it has not more calls than that.
_SECONDS, _MOST_CALLS = 1e-3, 256
# More copies of small tensors than that cost more to make than they tell.
_MOST_COPIES = 32
# What is read or written between two calls with the same tensors, in sizes of the cache.
_CACHES = 2


def copies(nbytes: int, cache: int) -> int:
    """How many sets of tensors of ``nbytes`` take turns on a GPU with so large a cache."""
    return max(1, min(_MOST_COPIES, math.ceil(_CACHES * cache / max(1, nbytes))))


def cache_bytes() -> int:
    """Of the last-level cache of the current GPU."""
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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in warm_up:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timings(
    candidates: Mapping[str, Sequence[Call]], once: Mapping[str, float], *, rounds: int, budget: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """What a call of each candidate takes, replayed in turn with the others; and why some cannot be captured.

    Args:
        candidates: of each a call for every set of tensors.
        once: about how many seconds a call takes.
        rounds, budget: as :func:`gencore.bench.measure.interleave` takes them.
    """
    graphs: dict[str, Graph] = {}
    failures: dict[str, str] = {}
    for name, calls in candidates.items():
        wanted = _SECONDS / max(once[name], 1e-7) / len(calls)
        try:
            graphs[name] = Graph(calls, max(1, min(round(wanted), _MOST_CALLS // len(calls))))
        except RuntimeError as error:
            failures[name] = f"a CUDA graph cannot have it: {error}"
            torch.cuda.synchronize()
    found = interleave(graphs, rounds=rounds, round_seconds=0.0, device="cuda", budget=budget) if graphs else {}
    return {
        name: Timing(tuple(seconds / graphs[name].calls for seconds in timing.seconds))
        for name, timing in found.items()
    }, failures
