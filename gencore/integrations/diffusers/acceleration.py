"""What :func:`accelerate` replaces in a model, a scheduler or a pipeline, how it says so, and how it is undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from gencore.integrations.diffusers.parts import Explanation, Part, Replacement


class Acceleration:
    """What :func:`accelerate` did, which :meth:`undo` takes back. As a context manager it does so at the end.

    A copy of it that is made together with the model's, as ``copy.deepcopy((model, acceleration))`` does, is the
    copy's.
    """

    def __init__(self, replacements: Iterable[Replacement]):
        self._replacements: list[Replacement] = []
        self._last: Explanation | None = None
        try:
            for replacement in replacements:
                self._replacements.append(replacement)
        except BaseException:
            self.undo()
            raise

    def explain(self) -> Explanation:
        """What runs on which of our kernels, and what does not and why: as it is now, or was when it was undone."""
        if self._last is not None:
            return self._last
        parts: dict[bool, list[Part]] = {True: [], False: []}
        for replacement in self._replacements:
            if (told := replacement.told()) is not None:
                part, is_ours = told
                parts[is_ours].append(part)
        return Explanation(tuple(parts[True]), tuple(parts[False]))

    def undo(self) -> None:
        """Makes everything as it was before, but for what somebody else has replaced since; again, it does nothing."""
        try:
            if self._last is None:
                self._last = self.explain()
        finally:
            while self._replacements:
                self._replacements.pop().undo()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        explanation = self.explain()
        state = "" if self._last is None else ", undone"
        return f"<Acceleration: {len(explanation.replaced)} replaced, {len(explanation.kept)} left as they were{state}>"


def accelerate(target: Any) -> Acceleration:
    """Makes a model, a scheduler or a pipeline of diffusers run on our kernels, in place, until it is undone.

    In any module, such as a ``UNet2DModel``, a ``UNet2DConditionModel`` or an ``AutoencoderKL``:

    - in a ``ResnetBlock2D``, each group norm and the SiLU behind it are one kernel, which adds the embedding of the
      time step before, or scales and shifts with it;
    - every other ``GroupNorm`` is our kernel;
    - an ``Attention`` whose processor is ``AttnProcessor2_0`` calls :func:`gencore.ops.attention` on views of its
      projections.

    In a ``DDPMScheduler`` or ``DDIMScheduler``, a step is one pass over memory, with diffusers' coefficients and the
    noise that its generator draws.

    Results differ by rounding only; their memory formats and the values that dropout draws are diffusers'. Parameters,
    state dict, configuration, attention processors, the names of classes and everything else stay as they are;
    training, autocast, half precision, channels_last and ``torch.compile`` work as before.

    What is added later has its effect: a call runs diffusers' own code where a norm, an activation or an attention that
    the kernel would pass by has hooks, another class or another ``forward``, such as those of offloading, pruning,
    parametrization, sharding and adapters; and where somebody watches PyTorch's functions, or replaced
    them or diffusers', before this call too.

    A copy (``copy.deepcopy``, ``pickle``) is accelerated as its original is, and stays so if that is undone; it is
    undone by ``accelerate(copy).undo()``. What is loaded from a checkpoint is not accelerated.

    Args:
        target: a module, a scheduler, or a pipeline, of which every module and the scheduler are accelerated. What is
            accelerated already is left alone, so that a second call replaces nothing.

    Returns:
        What was done: ``explain()`` lists it, with the reason for everything that runs as it was; ``undo()`` takes
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
        return Acceleration(modules.replacements(target))
    if schedulers.is_scheduler(target):
        return Acceleration(schedulers.replacements("scheduler", target))
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(f"target must be a module, a scheduler or a pipeline of diffusers, got {type(target).__name__}")

    def of_components() -> Iterable[Replacement]:
        for name, component in components.items():
            if isinstance(component, nn.Module):
                yield from modules.replacements(component, name)
            elif schedulers.is_scheduler(component):
                yield from schedulers.replacements(name, component)

    return Acceleration(of_components())
