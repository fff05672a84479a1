"""How a phase descends: its loss as a module, its optimiser, its figures; and the moving average of the weights."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gencore.models.base import GenerativeModel, Loss, Phase, Step, is_frozen
from gencore.models.optimizers import Optimizer
from gencore.processes import Processes
from gencore.train.config import AverageConfig
from gencore.train.errors import TrainingError
from gencore.train.log import Meter

# What PyTorch says of second derivatives: FSDP2 has divided the weights again before they are asked for.
_NO_SECOND_DERIVATIVE = {
    "train.sharding=full": "setStorage",
    "train.compile=true": "does not currently support double backward",
}


class PhaseLoss(nn.Module):
    """A phase's loss as the forward of a module: what DDP, FSDP and ``torch.compile`` see. Its parameters are those
    that descend."""

    def __init__(self, phase: Phase):
        super().__init__()
        self.loss = phase.loss
        for i, parameter in enumerate(phase.optimizer.parameters):
            self.register_parameter(str(i), parameter)

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The value, and the metrics without their graph."""
        loss = checked_loss(self.loss(step))
        return loss.value, {name: torch.as_tensor(metric).detach() for name, metric in loss.metrics.items()}


def checked_loss(loss: Any) -> Loss:
    """Raises TypeError unless ``loss`` is a Loss with a scalar."""
    if not isinstance(loss, Loss) or not isinstance(loss.value, Tensor) or loss.value.dim() != 0:
        raise TypeError(f"it must be a Loss with a scalar value, but is {loss!r}")
    return loss


class Losses(nn.Module):
    """The losses of all phases as one module, so that one reducer of DDP shares the gradients of all."""

    def __init__(self, losses: Sequence[PhaseLoss]):
        super().__init__()
        self.losses = nn.ModuleList(losses)
        # One that no loss reaches: without any, DDP warns that it need not look for them.
        self.unused = nn.Parameter(torch.zeros(1, device=next(losses[0].parameters()).device))

    def forward(self, index: int, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a phase."""
        result: tuple[Tensor, dict[str, Tensor]] = self.losses[index](step)
        return result


def shared(runners: Sequence[PhaseRunner]) -> None:
    """Lets DDP share the gradients of these phases with the other processes."""
    # Parameters that a loss does not reach in some step, such as those of one class, are no error.
    module = nn.parallel.DistributedDataParallel(
        Losses([runner.loss for runner in runners]), find_unused_parameters=True
    )
    for runner in runners:
        runner.ddp = module


class Descent:
    """An optimiser of a model's, in PyTorch's form, with the names of its parameters in the model."""

    def __init__(self, name: str, optimizer: Optimizer, model: nn.Module, device: torch.device):
        self.name = name
        self.parameters = optimizer.parameters
        names = {id(parameter): called for called, parameter in model.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.parameters]
        groups = [{"params": list(group.parameters), **group.settings.arguments()} for group in optimizer.groups]
        kind = optimizer.groups[0].settings.kind
        sharded = any(map(is_divided, self.parameters))
        # PyTorch's fused SGD fails where some parameters have a momentum already and others had no gradient so far.
        has_fused = "fused" in inspect.signature(kind).parameters and not issubclass(kind, torch.optim.SGD)
        if has_fused and device.type in ("cpu", "cuda") and not sharded:
            groups = [{"fused": True, **group} for group in groups]
        self.optimizer: torch.optim.Optimizer = kind(groups)  # type: ignore[call-arg]
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def learning_rate(self) -> float:
        """That of the last step, of the first group."""
        return self.optimizer.param_groups[0]["lr"]

    def scale_rates(self, factor: float) -> None:
        """Sets every group's learning rate to its own times ``factor``."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by optimiser, parameter and name; all processes call it together."""
        return {
            f"{self.name}/{name}/{key}": whole(torch.as_tensor(value))
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`.

        Raises:
            ValueError: a state of a shape that does not fit its parameter.
        """
        state: dict[int, dict[str, Tensor]] = {}
        for i, name in enumerate(self.names):
            prefix = f"{self.name}/{name}/"
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for key, value in found.items():
                # Some states are smaller, such as a mean over the columns (Adafactor).
                if value.dim() and not _broadcasts(value.shape, self.parameters[i].shape):
                    shapes = f"{tuple(value.shape)} for {tuple(self.parameters[i].shape)}"
                    raise ValueError(f"{prefix}{key} of shape {shapes}")
            # A parameter that never had a gradient has no state.
            if found:
                state[i] = {key: _laid_out_as(self.parameters[i], value) for key, value in found.items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def is_divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module takes a second to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is divided among the processes, put together; all of them call it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def divided_as(like: Tensor, value: Tensor) -> Tensor:
    """``value`` divided among the processes as ``like`` is."""
    if not is_divided(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` with the parameter's strides: the fused optimiser takes it that both have the same."""
    if value.shape != parameter.shape:
        return value.clone()
    if is_divided(parameter):
        return divided_as(parameter, value)
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


class PhaseRunner:
    """A phase with what runs its loss, its :class:`Descent` and its figures."""

    def __init__(
        self,
        index: int,
        phase: Phase,
        descent: Descent,
        processes: Processes,
        *,
        sharded: GenerativeModel | None = None,
        scaled: bool = False,
    ):
        """``sharded``: the model, if its parameters are divided among the processes."""
        self.index, self.phase, self.descent, self.processes, self.sharded = index, phase, descent, processes, sharded
        self.meter = Meter()
        self.loss = PhaseLoss(phase)
        self.ddp: nn.parallel.DistributedDataParallel | None = None
        self.scaler = torch.amp.GradScaler(phase.optimizer.parameters[0].device.type) if scaled else None
        self._sums: dict[str, Tensor] = {}

    def compile(self) -> None:
        """Compiles the loss at its next call."""
        self.loss.compile()

    def clear(self) -> None:
        """Forgets the gradients and figures of the last step."""
        self.descent.optimizer.zero_grad(set_to_none=True)
        self._sums = {}

    def add(self, step: Step, share: float = 1.0, *, is_last: bool = True) -> Tensor:
        """Adds the gradients of one part of the minibatch, and gives its loss.

        Args:
            share: of the images of the whole minibatch, of all processes.
            is_last: whether no part of it comes after; gradients are shared with the other processes then.
        """
        ddp = self.ddp
        with nullcontext() if ddp is None or is_last else ddp.no_sync(), self._alone():
            if ddp is not None:
                value, metrics = ddp(self.index, step)
            elif self.sharded is not None:
                value, metrics = self.sharded(self.loss, step)
            else:
                value, metrics = self.loss(step)
            # The gradients of the processes are averaged, so that a process counts as its share of all.
            weight = share * self.processes.size
            self._backward(value if weight == 1 else value * weight)
        for name, scalar in {"loss": value.detach(), **metrics}.items():
            weighted = scalar if share == 1 else scalar * share
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        return value.detach()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it, DDP does not wait for the gradients of other phases' parameters, which nobody computes."""
        others: list[Tensor] = []
        if self.ddp is not None:
            own = {id(parameter) for parameter in self.descent.parameters}
            others = [p for p in self.ddp.parameters() if p.requires_grad and id(p) not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _backward(self, value: Tensor) -> None:
        try:
            self._differentiate(value)
        except RuntimeError as error:
            for setting, told in _NO_SECOND_DERIVATIVE.items():
                if told in str(error):
                    raise TrainingError(
                        f"{setting} cannot train phase {self.phase.name!r}: its loss holds a gradient, such as a "
                        "gradient penalty, which PyTorch cannot differentiate then"
                    ) from error
            raise

    def _differentiate(self, value: Tensor) -> None:
        scaled = value if self.scaler is None else self.scaler.scale(value)
        if self.sharded is not None:
            # The leaves of the graph are the parameters put together, which FSDP's hooks divide again.
            torch.autograd.backward(scaled)
        else:
            # Only this phase's parameters: the generator's loss leaves no gradient in the discriminator.
            torch.autograd.backward(scaled, inputs=list(self.descent.parameters))

    def descend(self, step: int, clip: float | None = None) -> Tensor:
        """One step of the optimiser down the gradients, and their norm; ``step`` is only what the meter calls it."""
        optimizer, parameters = self.descent.optimizer, self.descent.parameters
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        loss = self._sums["loss"]
        # A gradient that overflowed by its scale is left out, and the scale made smaller.
        is_finite = loss.isfinite() if self.scaler is not None else (loss + norm).isfinite()
        told = norm if self.processes.is_first else torch.zeros_like(norm)
        others = {name: scalar for name, scalar in self._sums.items() if name != "loss"}
        self.meter.add(step, {"loss": loss, "gradient_norm": told, **others}, is_finite)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        return norm

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, for JSON. All processes call it together."""
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        return {"meter": self.meter.state(self.processes), "scaler": scaler}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state`."""
        self.meter.load_state(state["meter"], self.processes)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))


class Average:
    """The exponential moving average of a model's floating-point state, without frozen parts; the rest is copied."""

    def __init__(self, model: GenerativeModel, config: AverageConfig):
        self.config = config
        frozen = tuple(f"{name}." for name, module in model.named_modules() if is_frozen(module))
        self.tensors = {
            name: tensor.detach().clone() for name, tensor in model.state_dict().items() if not name.startswith(frozen)
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """One step of the average after ``step`` finished ones; early on it forgets faster, so that the initial weights
        are soon gone."""
        config = self.config
        if step >= config.begin and (step - config.begin) % config.every:
            return
        past = (step - config.begin) // config.every
        decay = min(config.decay, (1 + past) / (10 + past)) if past >= 0 else 0.0
        averages: list[Tensor] = []
        currents: list[Tensor] = []
        state = model.state_dict()
        for name, average in self.tensors.items():
            if average.is_floating_point() and decay:
                averages.append(average)
                currents.append(state[name])
            else:
                average.copy_(state[name])
        if averages:
            get_ema_multi_avg_fn(decay)(averages, currents, None)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from a checkpoint's tensors."""
        for name, tensor in self.tensors.items():
            tensor.copy_(divided_as(tensor, tensors[name]))


def shard(model: GenerativeModel, device: torch.device) -> None:
    """Divides a model's parameters among the processes (FSDP2), to be put together where they are needed.

    What is put together at a time is a block, an element of a ``ModuleList``; then what is left of a child of the
    model; then what is left of the model. Blocks and children are taken to be called, and are left to what is around
    them if they have no forward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Nothing here changes what a module returned in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    children = [child for child in model.children() if not is_frozen(child)]
    blocks = [
        block
        for child in children
        for module in child.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    ]
    for module in (*blocks, *children):
        is_called = getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"
        if is_called and not isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("sample", "edit", "encode", "decode", "log_likelihood_bound"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def phases_fault(phases: Sequence[Phase], model: GenerativeModel) -> str | None:
    """What is wrong with the phases that a model lists, or None."""
    if wrong := [phase for phase in phases if not isinstance(phase, Phase)]:
        return f"phases() of its model must return gencore.models.Phase, but holds {type(wrong[0]).__name__}"
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        return f"its model lists two phases of one name: {', '.join(names)}"
    for i, phase in enumerate(phases):
        what = f"phase {phase.name!r} of its model"
        if not isinstance(phase.optimizer, Optimizer):
            return f"{what} must have a gencore.models.Optimizer, but has {type(phase.optimizer).__name__}"
        if phase.repeats < 1 or phase.every < 1:
            return f"{what} must have repeats and every of at least 1, but has {phase.repeats} and {phase.every}"
        if any(id(parameter) not in own for parameter in phase.optimizer.parameters):
            return f"{what} must train parameters of the model that are not frozen"
        if phase.batch_of is not None:
            before = {other.name: other for other in phases[:i] if other.batch_of is None}
            if phase.batch_of not in before:
                return f"{what} must take the batch of an earlier phase that draws its own, but of {phase.batch_of!r}"
            if phase.every % before[phase.batch_of].every:
                return f"{what} must run only in steps of {phase.batch_of!r}, whose batch it takes"
    return None
