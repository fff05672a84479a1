"""Steps of training the plugins' models, and sampling: what a user waits for, ours against PyTorch's operations.

A training step is the loss, its gradient, and AdamW. Its peer is the same model of the same weights on PyTorch's
operations, those of :mod:`gencore.bench.plain`; sampling's is diffusers, its network and its scheduler.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gencore import Key, diffusion, ops, plugins
from gencore.bench import cases, peers
from gencore.bench.cases import NetworkCase
from gencore.bench.limits import Work
from gencore.bench.suite import _meanflow, networks
from gencore.bench.suite.base import HALF, Benchmark, Call, Comparison, largest_error
from gencore.bench.suite.diffusion_step import DDIM, SCHEDULE, STEPS
from gencore.integrations.diffusers import accelerate
from gencore.models import GenerativeModel, Step
from gencore.processes import ALONE
from gencore.spec import Batch, DataSpec
from gencore.train.descent import Descent, PhaseRunner

_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
_SAMPLING_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}
# Of the learning rates: so small that the loss stays what it is. The work is the same.
_FACTOR = 1e-4
_SETTINGS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "vae": ("vae", {"latent_size": 20}, {"hidden_sizes": (16,), "latent_size": 4}),
    "ddpm": ("ddpm", {}, {"channels": (8, 16), "num_groups": 4, "blocks_per_level": 1}),
    "ddpm-cifar10": (
        "ddpm",
        {"channels": (128, 256, 256, 256), "attention_levels": (1,), "num_groups": 32},
        {"channels": (8, 16), "attention_levels": (1,), "num_groups": 4, "blocks_per_level": 1},
    ),
}


def _model(case: NetworkCase, device: str) -> GenerativeModel:
    name, settings, small = _SETTINGS[case.name]
    plugin = plugins.MODELS.load(name)
    spec = DataSpec((_channels(case), case.size, case.size))
    torch.manual_seed(0)
    return plugins.build_model(plugin, plugin.config_of(small if case.small else settings), spec).to(device)


def _channels(case: NetworkCase) -> int:
    return 3 if case.name == "ddpm-cifar10" else 1


def _step(model: GenerativeModel, batch: Batch, dtype: torch.dtype, is_plain: bool = False) -> Callable[[], Tensor]:
    """What the trainer does in a step of a model's only phase; gives the loss and the gradient's norm."""
    (phase,) = model.phases()
    descent = Descent(phase.name, phase.optimizer, model, batch.images.device)
    descent.scale_rates(_FACTOR)
    runner = PhaseRunner(0, phase, descent, ALONE)
    numbers = itertools.count()

    def step() -> Tensor:
        number = next(numbers)
        runner.clear()
        # In a half type as trainers have it: under autocast, the weights in float32.
        autocast = torch.autocast(batch.images.device.type, dtype, enabled=dtype in HALF)
        with networks.on_operations(is_plain), autocast:
            loss = runner.add(Step(batch, Key(0).fold_in(number)))
        return torch.stack([loss, runner.descend(number)])

    return step


def _compiled(model: GenerativeModel) -> GenerativeModel:
    """With its networks compiled, which lie between what draws noise."""
    for network in model.children():
        if next(network.parameters(), None) is not None:
            network.compile(dynamic=False)
    return model


def training_step(case: NetworkCase, dtype: torch.dtype, device: str) -> Comparison:
    model = _model(case, device)
    if dtype == torch.float64:
        model.double()
    images = torch.rand(case.batch, _channels(case), case.size, case.size, device=device)
    batch = Batch(images.double() if dtype == torch.float64 else images)

    @functools.lru_cache(maxsize=1)
    def expected() -> Tensor:
        """Loss and norm of PyTorch's operations, the mean of four draws."""
        step = _step(copy.deepcopy(model), batch, torch.float32, is_plain=True)
        return torch.stack([step() for _ in range(4)]).double().mean(0)

    def error(result: Tensor) -> float:
        """The larger one of both deviations, each in what it may be, as every candidate draws other noise."""
        # Seven standard errors of the mean square of so many values; the norm, which has no such law, half itself more.
        loss = 7 * (2 / batch.images.numel()) ** 0.5
        allowed = expected() * torch.tensor([loss, 0.5 + loss], dtype=torch.float64, device=result.device)
        worst = ((result.double() - expected()).abs() / allowed).max().item()
        return math.inf if math.isnan(worst) else worst

    counter = FlopCounterMode(display=False)
    # Only of the plain formula does the counter see every product.
    with sdpa_kernel(SDPBackend.MATH), counter:
        _step(copy.deepcopy(model), batch, torch.float32, is_plain=True)()
    count = counter.get_total_flops()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Comparison(
        {
            "ours": _step(copy.deepcopy(model), batch, dtype),
            "eager": _step(copy.deepcopy(model), batch, dtype, is_plain=True),
            # Before ours, which finds its networks compiled where none of our ops is in them.
            "compile": _step(_compiled(copy.deepcopy(model)), batch, dtype, is_plain=True),
            "ours, compiled": _step(_compiled(copy.deepcopy(model)), batch, dtype),
        },
        # AdamW reads a weight, its gradient and two moments, and writes three of them, in 12 operations. The products
        # before it read the weights twice and write the gradients.
        Work(nbytes=10 * 4 * parameters + batch.images.nbytes, products=count, flops=count + 12 * parameters),
        error,
        1.0,
    )


def sampling(case: NetworkCase, dtype: torch.dtype, device: str) -> Comparison:
    """DDIM in 50 steps: ours by our loop, diffusers' by its scheduler, all from the same noise.

    The network is taken to predict x0, which is the same work: of an untrained one's prediction of the noise the first
    steps would make a hundred times its rounding.
    """
    built = networks.pair(case, device)
    key = Key(0)
    sampler = diffusion.ddim(SCHEDULE, STEPS, clip=1.0, spacing="leading", parameterization="x0")
    shape = tuple(built.inputs[0].shape)
    start = sampler.initial_scale * ops.normal(shape, key.stream(0), dtype=dtype, device=device)

    def by_ours(candidate: networks.Candidate) -> Call:
        layout = torch.channels_last if _is_channels_last(candidate) else torch.contiguous_format
        options: dict[str, Any] = {"dtype": dtype, "device": device, "memory_format": layout}

        def run() -> Tensor:
            with networks.on_operations(candidate.is_plain):
                # The noise that it draws is what the others are given, but on PyTorch's operations.
                return diffusion.sample(candidate.run, shape, sampler, key, **options)

        return run

    def by_diffusers(candidate: networks.Candidate, accelerated: bool = False) -> Call:
        scheduler = peers.diffusers_scheduler(DDIM.theirs, device, STEPS, prediction_type="sample")
        if accelerated:
            accelerate(scheduler)
        layout = torch.channels_last if _is_channels_last(candidate) else torch.contiguous_format
        noise = start.to(candidate.inputs[0].dtype)[: len(candidate.inputs[0])].contiguous(memory_format=layout)

        @torch.no_grad()
        def run() -> Tensor:
            x = noise
            for t in scheduler.timesteps:
                x = scheduler.step(candidate.called(x, t), t, x).prev_sample
            return x

        return run

    found = networks.candidates(built, dtype)
    calls: dict[str, Call] = {}
    for name, candidate in found.items():
        theirs = "diffusers" in name
        calls[name] = by_diffusers(candidate, name.startswith("ours")) if theirs else by_ours(candidate)
    # Fifty steps round, and so does what they are held against. Without diffusers no peer begins with the same noise.
    error = None
    if not built.is_plain:
        # In float64 a minute would not do.
        exact = by_diffusers(networks.definition(built, dtype, torch.float32))
        error = largest_error(lambda: exact().double(), of=lambda result: result[:1])
    count = STEPS * networks.products(built)
    mine = found["ours"]
    return Comparison(
        calls,
        Work(nbytes=STEPS * (networks.weights_nbytes(mine) + 2 * mine.inputs[0].nbytes), products=count, flops=count),
        error,
        None if error is None else 5 * networks.tolerance(dtype, device),
    )


def _is_channels_last(candidate: networks.Candidate) -> bool:
    return not candidate.inputs[0].is_contiguous()


BENCHMARKS = (
    *(
        Benchmark(
            "training",
            f"{name} training step",
            training_step,
            [case for case in cases.TRAINING if case.name.split("-")[0] == name],
            _DTYPES,
            section="end to end",
        )
        for name in ("vae", "ddpm")
    ),
    Benchmark("training", "MeanFlow step", _meanflow.training_step, cases.MEANFLOW, _DTYPES, section="end to end"),
    Benchmark("training", "sampling in 50 steps", sampling, cases.SAMPLING, _SAMPLING_DTYPES, section="end to end"),
)
