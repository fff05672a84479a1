"""The ops on DTensors: which part of the work each process does. Imported once ``torch.distributed.tensor`` is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from gencore.ops._checks import rows_of
from gencore.ops._library import Layout, Layouts

# Arguments that are the same in every process, and that no user distributes.
_SHARED = ("key", "table", "rows", "filter")


def register(name: str, layouts: Layouts, library: Any) -> None:
    """Lets the op take DTensors: of the layouts it may have, a call takes the one that moves the least data.

    What has another placement is redistributed first, as PyTorch's own operations do.
    """
    op = getattr(torch.ops.gencore, name).default
    arguments = op._schema.arguments
    written = [argument.name for argument in arguments if argument.is_write]

    def distributed(cls: Any, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = {argument.name: argument.default_value for argument in arguments}
        given.update(zip(given, args, strict=False))
        with torch.no_grad():
            return _distributed(op, given, layouts(given), written)

    torch.library.register_torch_dispatch(f"gencore::{name}", DTensor, distributed, lib=library)


def _distributed(op: Any, given: dict[str, Any], layouts: Sequence[Layout], written: Sequence[str]) -> Any:
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    sharded = {name: value for name, value in tensors.items() if isinstance(value, DTensor)}
    plain = [name for name in tensors if name not in sharded and name not in _SHARED]
    if plain:
        raise TypeError(
            f"{plain[0]} must be a DTensor, as {next(iter(sharded))} is, got a tensor of this process alone"
        )
    written = [name for name in written if name in sharded]
    first = next(iter(sharded.values()))
    mesh, samples = first.device_mesh, _samples(sharded)
    outputs = len(op._schema.returns)
    ways = [Layout({}, ()), *layouts]
    # Each dimension of the mesh shares out the work in its own way.
    chosen = [min(ways, key=lambda way: _moved(way, sharded, written, dim)) for dim in range(mesh.ndim)]
    for name in written:
        if any(_placement(way, name) != have for way, have in zip(chosen, sharded[name].placements, strict=True)):
            raise ValueError(
                f"{name} must be replicated or sharded along the samples, dimension 0, as it is written to; got "
                f"{sharded[name].placements}"
            )

    def local(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        placements = [_placement(way, name) for way in chosen]
        if not isinstance(value, DTensor):
            if all(placement == Replicate() for placement in placements):
                return value
            if name == "key" and value.dim() == 1:
                value = rows_of(value, samples)
            elif len(value) == 1:  # One row for all samples.
                return value
            value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return value.redistribute(placements=placements).to_local()

    results = op(*(local(name, value) for name, value in given.items()))
    if outputs == 0:
        return None
    wholes = op(*(_without_data(value) for value in given.values()))
    if outputs == 1:
        results, wholes = (results,), (wholes,)
    made = tuple(
        _whole(result, whole, mesh, [_made(way, i) for way in chosen])
        for i, (result, whole) in enumerate(zip(results, wholes, strict=True))
    )
    return made[0] if outputs == 1 else made


def _samples(sharded: Mapping[str, DTensor]) -> int:
    """The batch of the whole call; of several draws, which come before it, the batch is that of the other tensors."""
    return next(value for name, value in sharded.items() if name not in ("grad_z", "grad_kl")).shape[0]


def _placement(way: Layout, name: str) -> Placement:
    return Shard(way.inputs[name]) if name in way.inputs else Replicate()


def _made(way: Layout, output: int) -> Placement:
    if not way.outputs:
        return Replicate()
    dim = way.outputs[output]
    return Partial() if dim is None else Shard(dim)


def _moved(way: Layout, sharded: Mapping[str, DTensor], written: Sequence[str], dim: int) -> float:
    """How many elements processes would send each other; a part of what they all have is at hand."""
    total = 0.0
    for name, value in sharded.items():
        have = value.placements[dim]
        if have != _placement(way, name):
            total += math.inf if name in written else 0 if have == Replicate() else value.numel()
    return total


def _without_data(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _whole(result: Tensor, whole: Tensor, mesh: Any, placements: Sequence[Placement]) -> DTensor:
    """The DTensor of which ``result`` is the part of this process, and ``whole`` the shape."""
    if whole.dim() == 1 and not whole.numel():  # It stands for an output that is not wanted.
        placements = [Replicate()] * mesh.ndim
    return DTensor.from_local(result, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
