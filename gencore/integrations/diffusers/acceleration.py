"""What :func:`accelerate` replaces in a model, a scheduler or a pipeline, how it says so, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

ALREADY = "it runs on gencore's kernels already"


class Part(NamedTuple):
    """A part of what was given to :func:`accelerate`, and what was done with it.

    Attributes:
        name: its path, as ``named_modules`` has it; "scheduler" for a scheduler.
        type: the name of its class.
        what: what runs it now; or, if it was left as it was, why.
    """

    name: str
    type: str
    what: str


@dataclass(frozen=True)
class Explanation:
    """What was replaced, and what was not. Printed, it is a few lines of text."""

    replaced: tuple[Part, ...]
    kept: tuple[Part, ...]

    def __str__(self) -> str:
        lines = []
        for title, parts in (("replaced", self.replaced), ("left as it was", self.kept)):
            groups: dict[tuple[str, str], list[str]] = {}
            for part in parts:
                groups.setdefault((part.type, part.what), []).append(part.name)
            lines.append(f"{title}: {len(parts) or 'nothing'}")
            for (kind, what), names in groups.items():
                lines.append(f"  {len(names)} {kind}: {what}")
                lines.append(f"    {', '.join(names)}")
        return "\n".join(lines)


class Acceleration:
    """What :func:`accelerate` did, which :meth:`undo` takes back. As a context manager it does so at the end."""

    def __init__(self, changes: Iterable[Change]):
        self._undo: list[Callable[[], None]] = []
        parts: dict[bool, list[Part]] = {True: [], False: []}
        try:
            for change in changes:
                if change.undo is not None:
                    self._undo.append(change.undo)
                parts[change.undo is not None].append(change.part)
        except BaseException:
            self.undo()
            raise
        self._explanation = Explanation(tuple(parts[True]), tuple(parts[False]))

    def explain(self) -> Explanation:
        """What was replaced and by what, and what was not and why."""
        return self._explanation

    def undo(self) -> None:
        """Makes everything as it was before, but for what somebody else has replaced since; again, it does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        replaced, kept = self._explanation.replaced, self._explanation.kept
        state = "" if self._undo or not replaced else ", undone"
        return f"<Acceleration: {len(replaced)} replaced, {len(kept)} left as they were{state}>"


class Change(NamedTuple):
    """A part, and what undoes its replacement; None if it was left as it was."""

    part: Part
    undo: Callable[[], None] | None = None


def accelerate(target: Any) -> Acceleration:
    """Makes a model, a scheduler or a pipeline of diffusers run on our kernels, in place, until it is undone.

    In any module, such as a ``UNet2DModel``, a ``UNet2DConditionModel`` or an ``AutoencoderKL``:

    - in a ``ResnetBlock2D``, each group norm and the SiLU behind it are one kernel, which adds the embedding of the
      time step before, or scales and shifts with it;
    - the last norm of a U-Net or of an autoencoder's halves takes its SiLU with it too;
    - every other ``GroupNorm`` is our kernel;
    - an ``Attention`` calls :func:`gencore.ops.attention` on views of its projections; with a mask it is diffusers'.

    In a ``DDPMScheduler`` or ``DDIMScheduler``, a step is one pass over memory, with diffusers' coefficients and the
    noise that its generator draws.

    Results differ by rounding only. Parameters, state dict, configuration, hooks of the modules around and everything
    else stay as they are; training, autocast, half precision, channels_last and ``torch.compile`` work as before. Hooks
    that are added to a norm or an activation inside a ``ResnetBlock2D`` later are not called. A copy
    (``copy.deepcopy``) is accelerated as its original is, and stays so if that is undone; what is loaded from a file is
    not.

    Args:
        target: a module, a scheduler, or a pipeline, of which every module and the scheduler are accelerated. What runs
            on our kernels already is left alone, so that a second call replaces nothing.

    Returns:
        What was done: ``explain()`` lists it, with the reason for everything that was left as it was; ``undo()`` takes
        it back, as the end of a ``with`` block does.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: ``target`` is none of these.

    >>> with accelerate(unet) as acceleration:  # doctest: +SKIP
    ...     print(acceleration.explain())
    ...     sample = unet(x, t).sample
    """
    # Here, as this module is imported where diffusers is not installed.
    from gencore.integrations.diffusers import modules, schedulers

    if isinstance(target, nn.Module):
        return Acceleration(modules.changes(target))
    if schedulers.is_scheduler(target):
        return Acceleration(schedulers.changes("scheduler", target))
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(f"target must be a module, a scheduler or a pipeline of diffusers, got {type(target).__name__}")

    def of_components() -> Iterable[Change]:
        for name, component in components.items():
            if isinstance(component, nn.Module):
                yield from modules.changes(component, f"{name}.")
            elif schedulers.is_scheduler(component):
                yield from schedulers.changes(name, component)

    return Acceleration(of_components())
