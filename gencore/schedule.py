"""Noise levels by step, and what follows from them: what a network predicts, what its loss weighs.

``x_t = alpha_t x0 + sigma_t eps`` with eps standard normal: every diffusion and flow model is a list of such levels.
They are kept in float64; kernels round each coefficient once to the type they compute in.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gencore._torch import (
    has_values,
    is_faking,
    is_wrapped,
    lifted,
    on_cpu,
    register_loading,
    without_modes,
)

Parameterization = Literal["eps", "x0", "v", "velocity"]
Weighting = Literal["simple", "snr", "min_snr"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

# Of a schedule at once: a training needs two for each device.
_MOST_TABLES = 16
_NO_NOISE_AT_THE_END = (
    "parameterization must be v, x0 or velocity for a schedule that ends without signal (alpha = 0): there the noise "
    "says nothing about the data; got 'eps'"
)


class Schedule:
    """The levels ``x_t = alpha[t] x0 + sigma[t] eps`` of T steps, from the least noise, t = 0, to the most. Immutable.

    Args:
        alpha: (T,) or anything that makes such a tensor: the signal's scale, at least 0. sqrt(alpha_bar) of DDPM.
        sigma: (T,): the noise's scale, more than 0 and rising relative to ``alpha``. sqrt(1 - alpha_bar) of DDPM.
        times: (T,): what a network is told at each step; by default 0, 1, ..., T - 1.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    >>> schedule = Schedule(alpha=[0.9, 0.5], sigma=[0.1, 0.5])
    >>> len(schedule), schedule.snr.tolist()
    (2, [81.0, 1.0])
    """

    __slots__ = ("_tables", "alpha", "ends_in_noise", "is_variance_preserving", "sigma", "times")

    alpha: Tensor
    """(T,) float64: the scale of the signal."""
    sigma: Tensor
    """(T,) float64: the scale of the noise."""
    times: Tensor
    """(T,) float64: what a network is told at each step."""
    is_variance_preserving: bool
    """Whether alpha^2 + sigma^2 = 1 at every step, as a Markov chain of DDPM has it."""
    ends_in_noise: bool
    """Whether nothing is left of the signal at the last step, alpha = 0."""
    _tables: dict[Any, Tensor]

    @on_cpu
    def __init__(self, alpha: Any, sigma: Any, times: Any = None):
        levels = {"alpha": _levels("alpha", alpha), "sigma": _levels("sigma", sigma)}
        steps = len(levels["alpha"])
        levels["times"] = (
            torch.arange(steps, dtype=torch.float64, device="cpu") if times is None else _levels("times", times)
        )
        for name in ("sigma", "times"):
            if len(levels[name]) != steps:
                raise ValueError(f"{name} must have the length of alpha, {steps}, got {len(levels[name])}")
        if bool((levels["alpha"] < 0).any()):
            raise ValueError(f"alpha must be at least 0, got {levels['alpha'].min().item():g}")
        if bool((levels["sigma"] <= 0).any()):
            raise ValueError(f"sigma must be more than 0, got {levels['sigma'].min().item():g}")
        ratio = levels["sigma"] / levels["alpha"]
        falling = (ratio[1:] <= ratio[:-1]).nonzero()
        if len(falling):
            step = int(falling[0]) + 1
            raise ValueError(f"sigma / alpha must rise from step to step, but falls or stays at step {step}")
        for name, values in levels.items():
            object.__setattr__(self, name, values)
        object.__setattr__(self, "_tables", {})
        # Found out here, as a compiler cannot look at values.
        squares = levels["alpha"].square() + levels["sigma"].square()
        object.__setattr__(self, "is_variance_preserving", bool(((squares - 1).abs() < 1e-9).all()))
        object.__setattr__(self, "ends_in_noise", bool(levels["alpha"][-1] == 0))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Schedule is immutable: cannot set {name!r}; make another one")

    def __copy__(self) -> Schedule:
        return self

    def __deepcopy__(self, memo: Any) -> Schedule:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Numbers are the same wherever they are loaded, on the meta device too.
        return Schedule, (self.alpha.tolist(), self.sigma.tolist(), self.times.tolist())

    def __len__(self) -> int:
        return len(self.alpha)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in ("alpha", "sigma", "times"))

    __hash__ = None  # type: ignore[assignment]

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """What stands for a schedule in a graph of ``torch.fx``: an attribute of the module that is traced.

        It stays there (``_schedule0``, ...) if the module has none that is this schedule: whoever makes a GraphModule
        of the module and the graph, at any time, finds it there.
        """
        root = tracer.root
        held = [name for name, value in vars(root).items() if value is self]
        name = held[0] if held else f"_schedule{sum(isinstance(v, Schedule) for v in vars(root).values())}"
        setattr(root, name, self)
        return tracer.create_node("get_attr", name, (), {})

    def __repr__(self) -> str:
        return (
            f"Schedule({len(self)} steps, sigma / alpha from {(self.sigma[0] / self.alpha[0]).item():.4g} "
            f"to {(self.sigma[-1] / self.alpha[-1]).item():.4g})"
        )

    @property
    def snr(self) -> Tensor:
        """(T,): the signal-to-noise ratio alpha^2 / sigma^2."""
        return (self.alpha / self.sigma).square()

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,): alpha_bar of a variance-preserving schedule. Raises ValueError for another one."""
        if not self.is_variance_preserving:
            raise ValueError("schedule must be variance-preserving, alpha^2 + sigma^2 = 1, for a Markov chain of DDPM")
        return self.alpha.square()

    @property
    def betas(self) -> Tensor:
        """(T,): the variance a chain adds at each step, 1 - alpha_bar[t] / alpha_bar[t - 1]; ValueError as above."""
        return posterior(self.alphas_cumprod)[0]

    def prediction(self, parameterization: Parameterization) -> tuple[Tensor, Tensor]:
        """(a, b), (T,) each, with x0 = a x_t + b output for a network that predicts

        - ``"eps"``: the noise (Ho et al. 2020);
        - ``"x0"``: the data;
        - ``"v"``: alpha eps - sigma x0 (Salimans and Ho 2022, appendix D);
        - ``"velocity"``: eps - x0, of a straight path (Liu et al. 2023; Lipman et al. 2023).

        Raises:
            ValueError: another parameterization, or one that has no such a and b at a step (eps where alpha is 0).
        """
        if parameterization == "eps" and self.ends_in_noise:
            raise ValueError(_NO_NOISE_AT_THE_END)
        return _of_x_and_output(parameterization, self.alpha, self.sigma)

    def target(self, parameterization: Parameterization) -> tuple[Tensor, Tensor]:
        """(p, q), (T,) each, with p x0 + q eps what a network shall predict; see :meth:`prediction`."""
        zero, one = torch.zeros_like(self.alpha), torch.ones_like(self.alpha)
        check_parameterization(parameterization)
        return {"eps": (zero, one), "x0": (one, zero), "v": (-self.sigma, self.alpha), "velocity": (-one, one)}[
            parameterization
        ]

    def weight(self, parameterization: Parameterization, weighting: Weighting = "simple", gamma: float = 5.0) -> Tensor:
        """(T,): what the squared error of the prediction is weighed with.

        - ``"simple"``: 1 (Ho et al. 2020, equation 14);
        - ``"snr"``: as if the error of x0 were weighed with the SNR (Salimans and Ho 2022, section 4), 1 for eps;
        - ``"min_snr"``: as if that of x0 were weighed with min(SNR, gamma) (Hang et al. 2023, equation 6);
        - a tensor (T,): these.

        Raises:
            TypeError, ValueError: none of these, or a gamma that is no positive number.
        """
        check_parameterization(parameterization)
        if isinstance(weighting, Tensor):
            return self._own_weights(weighting).to("cpu")
        _check_weighting(weighting, gamma)
        if weighting == "simple":
            return torch.ones_like(self.alpha)
        # An error of the output is one of x0 times b.
        of_x0 = self.snr if weighting == "snr" else self.snr.clamp(max=gamma)
        if parameterization == "eps":  # b^2 = 1 / SNR, which must not meet an SNR of 0.
            return torch.ones_like(of_x0) if weighting == "snr" else (gamma / self.snr).clamp(max=1)
        return of_x0 * self.prediction(parameterization)[1].square()

    def log_variance(self, variance: Variance) -> tuple[Tensor, Tensor]:
        """(low, high), (T,) each: log variances of p(x_{t-1} | x_t), which are equal if the variance is fixed.

        ``"fixed_small"`` is the posterior's, beta~; ``"fixed_large"`` is beta; ``"learned_range"`` lies between them
        (Nichol and Dhariwal 2021, equation 15). As the posterior's is 0 at t = 0, that of t = 1 stands there.

        Raises:
            ValueError: another variance, or a schedule that is not variance-preserving.
        """
        if variance not in get_args(Variance):
            raise ValueError(f"variance must be one of {', '.join(get_args(Variance))}, got {variance!r}")
        betas, small, _, _ = posterior(self.alphas_cumprod)
        if len(self) < 2:
            raise ValueError(f"schedule must have at least two steps for the variance of a step back, has {len(self)}")
        low = torch.cat((small[1:2], small[1:])).log()
        if variance == "fixed_small":
            return low, low
        if variance == "fixed_large":
            high = torch.cat((small[1:2], betas[1:])).log()
            return high, high
        return low, betas.log()

    def add_noise_table(self, device: torch.device) -> Tensor:
        """(T, 2): alpha, sigma, as :func:`gencore.ops.add_noise` reads them."""
        return self._table(("add_noise",), device, lambda: torch.stack((self.alpha, self.sigma), 1))

    def loss_table(
        self,
        device: torch.device,
        parameterization: Parameterization,
        weighting: Weighting | Tensor | None,
        gamma: float,
        variance: Variance | None,
        bound_weight: float,
    ) -> Tensor:
        """(T, 8), as :func:`gencore.ops.denoising_loss` reads it; without a weighting, the squared error's weight is 0.

        Columns: what the target takes of x0 and of eps; the weights of the squared error and of the bound's term; what
        an error of the output moves the mean of p(x_{t-1} | x_t) by; its log variance at output 0 and what an output of
        1 adds to it; the posterior's log variance, at t = 0 minus infinity.
        """

        check_parameterization(parameterization)
        own = self._own_weights(weighting) if isinstance(weighting, Tensor) else None
        if own is None and weighting is not None:
            gamma = _check_weighting(weighting, gamma)
        kind = "simple" if isinstance(weighting, Tensor) else weighting

        def make() -> Tensor:
            p, q = self.target(parameterization)
            zero = torch.zeros_like(p)
            columns = [p, q, zero if kind is None else self.weight(parameterization, kind, gamma)]
            if variance is None:
                columns += [zero] * 5
            else:
                low, high = self.log_variance(variance)
                _, true, of_x0, _ = posterior(self.alphas_cumprod)
                true = torch.cat((torch.full_like(true[:1], -math.inf), true[1:].log()))
                moved = of_x0 * self.prediction(parameterization)[1]
                columns += [torch.full_like(p, bound_weight), moved, (low + high) / 2, (high - low) / 2, true]
            return torch.stack(columns, 1)

        cut = gamma if kind == "min_snr" else None
        table = self._table((parameterization, kind, cut, variance, bound_weight), device, make)
        if own is not None:
            # Without a look at the values, which on a GPU would wait for it.
            table = torch.cat((table[:, :2], own.to(device)[:, None], table[:, 3:]), 1)
        return table

    def _own_weights(self, weights: Tensor) -> Tensor:
        if weights.shape != self.alpha.shape:
            raise ValueError(f"weighting must have one value per step, {len(self)}, got shape {tuple(weights.shape)}")
        return weights.detach().to(torch.float64)

    def _table(self, name: tuple[Any, ...], device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling():
            # Made in the graph, of the levels: a look at the tables that are kept would be guarded, and each new one
            # compile the function again.
            return make().to(device, non_blocking=True)
        if is_faking():
            with without_modes():
                real = self._kept_table(name, torch.device("cpu"), make)
            return lifted(real).to(device)
        return self._kept_table(name, device, make)

    def _kept_table(self, name: tuple[Any, ...], device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        # A table is asked for at every step of a training, and moving it to a GPU would wait for that.
        table: Tensor | None = self._tables.get((name, device))
        if table is None:
            # Autograd may save it, also if it was first asked for in inference.
            with torch.inference_mode(False), torch.no_grad():
                table = make().to(device)
            if is_wrapped(table):
                return table
            while len(self._tables) >= _MOST_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[name, device] = table
        return table


register_loading((Schedule,))


def check_parameterization(parameterization: Any) -> None:
    if not isinstance(parameterization, str) or parameterization not in get_args(Parameterization):
        names = ", ".join(get_args(Parameterization))
        raise ValueError(f"parameterization must be one of {names}, got {parameterization!r}")


def prediction(parameterization: Parameterization, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """:meth:`Schedule.prediction` for any levels."""
    if parameterization == "eps" and bool((alpha == 0).any()):
        raise ValueError(_NO_NOISE_AT_THE_END)
    return _of_x_and_output(parameterization, alpha, sigma)


def _of_x_and_output(parameterization: Parameterization, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    check_parameterization(parameterization)
    if parameterization == "eps":
        return 1 / alpha, -sigma / alpha
    if parameterization == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if parameterization == "v":
        square = alpha.square() + sigma.square()
        return alpha / square, -sigma / square
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


def _check_weighting(weighting: Any, gamma: Any) -> float:
    """gamma as a float, after both were looked at."""
    if not isinstance(weighting, str) or weighting not in get_args(Weighting):
        names = ", ".join(get_args(Weighting))
        raise ValueError(f"weighting must be one of {names} or a tensor with one value per step, got {weighting!r}")
    if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
        raise TypeError(f"gamma must be a number, got {type(gamma).__name__}")
    if not float(gamma) > 0:
        raise ValueError(f"gamma must be more than 0, got {gamma}")
    return float(gamma)


def posterior(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(betas, betas~, of x0, of x_t), (T,) each: q(x_{t-1} | x_t, x0) = N(of_x0 x0 + of_x_t x_t, beta~).

    Source: Ho et al. (2020), equations 6 and 7, for any subset of a chain's steps.
    """
    before = torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod[:-1]))
    betas = 1 - alphas_cumprod / before
    rest = 1 - alphas_cumprod
    return betas, betas * (1 - before) / rest, before.sqrt() * betas / rest, (1 - betas).sqrt() * (1 - before) / rest


def _levels(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor) and not has_values(values):
        raise TypeError(f"{name} must be numbers, one per step, got a tensor without values ({values.device})")
    try:
        levels = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers, one per step, got {type(values).__name__}") from error
    if levels.dim() != 1 or len(levels) == 0:
        raise ValueError(f"{name} must be one number per step, of shape (T,), got shape {tuple(levels.shape)}")
    if not bool(levels.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {levels[~levels.isfinite()][0].item()}")
    return levels
