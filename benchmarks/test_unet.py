"""Whole networks of our kernels, against diffusers as its users run it: eager, channels_last, compiled.

On a machine without diffusers, the peers are the same networks of PyTorch's own group norm, SiLU and attention.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gencore import Key, diffusion, nn
from gencore.bench import limits
from gencore.bench.measure import Timing
from gencore.bench.peers import compiled, diffusers_scheduler
from gencore.integrations.diffusers import accelerate
from gencore.nn.residual import ResidualBlock, Upsample

try:
    import diffusers
except ImportError:
    diffusers = None

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# What every other network is compared with, compiled or not.
OURS = "ours channels_last"
STEPS = 50
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# google/ddpm-cifar10-32, of 35.7 million parameters, as diffusers and as we name what it is made of.
CIFAR10 = {
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}
OUR_CIFAR10 = {
    "channels": (128, 256, 256, 256),
    "attention_levels": (1,),
    "asymmetric_downsampling": True,
    "norm_eps": 1e-6,
}
# Of the same kind, and small: to see a benchmark run.
SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
OUR_SMALL = {"channels": (8, 16), "num_groups": 4, "blocks_per_level": 1}
# The U-Net of Stable Diffusion 1.5; ours has no transformer blocks, and self-attention alone where they are.
STABLE_DIFFUSION = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
OUR_STABLE_DIFFUSION = {"channels": (320, 640, 1280, 1280), "attention_levels": (0, 1, 2), "num_heads": 8}
# Its autoencoder.
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SMALL_AUTOENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


class PlainGroupNorm(nn.GroupNorm):
    """What our group norm does, of PyTorch's operations."""

    def forward(self, input, *, scale=None, shift=None, bias_in=None):
        x = input if bias_in is None else input + bias_in[:, :, None, None]
        y = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return y if self.activation is None else F.silu(y)


class PlainAttention(nn.SpatialSelfAttention):
    """What our attention does, of PyTorch's operations, as diffusers has it."""

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        qkv = F.linear(pixels, self.qkv.weight, self.qkv.bias).unflatten(2, (3, self.num_heads, -1))
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2)
        return x + F.linear(mixed, self.out.weight, self.out.bias).transpose(1, 2).reshape(x.shape)


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network of ours that runs on PyTorch's operations."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = PlainGroupNorm
        elif type(module) is nn.SpatialSelfAttention:
            module.__class__ = PlainAttention
    return model


class Decoder(torch.nn.Module):
    """Of the size of the autoencoder of Stable Diffusion, and of our blocks, whose embedding is 0 here."""

    def __init__(self, channels: tuple[int, ...], blocks: int, groups: int) -> None:
        super().__init__()
        width = channels[-1]
        self.conv_in = torch.nn.Conv2d(4, width, 3, padding=1)
        self.attention = nn.SpatialSelfAttention(width, num_groups=groups)
        self.middle = torch.nn.ModuleList(ResidualBlock(width, width, 1, num_groups=groups) for _ in range(2))
        levels = []
        for level, wanted in reversed(list(enumerate(channels))):
            up = [ResidualBlock(width, wanted, 1, num_groups=groups)]
            up += [ResidualBlock(wanted, wanted, 1, num_groups=groups) for _ in range(blocks - 1)]
            levels.append(torch.nn.ModuleList([*up, *([Upsample(wanted)] if level else [])]))
            width = wanted
        self.levels = torch.nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, width, activation="silu")
        self.conv_out = torch.nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        embedding = x.new_zeros(x.shape[0], 1)
        x = self.middle[0](self.conv_in(x), embedding)
        x = self.middle[1](self.attention(x), embedding)
        for level in self.levels:
            for block in level:
                size = [2 * side for side in x.shape[2:]]
                x = block(x, torch.Size(size)) if isinstance(block, Upsample) else block(x, embedding)
        return self.conv_out(self.norm_out(x))


class Candidate(NamedTuple):
    """A network, and what is called with its inputs: the network itself, or compiled."""

    model: torch.nn.Module
    run: Callable[..., Any]
    inputs: tuple[Any, ...]

    def __call__(self) -> torch.Tensor:
        output = self.run(*self.inputs)
        return output if isinstance(output, torch.Tensor) else output[0]


def variants(
    makers: dict[str, Callable[[], torch.nn.Module]],
    inputs: tuple[Any, ...],
    compiles: tuple[str, ...],
    formats: tuple[str, ...] = tuple(FORMATS),
) -> dict[str, Candidate]:
    """Each network in the memory formats, as it is and, if it is one of ``compiles``, compiled."""
    found = {}
    like = next(x for x in inputs if _is_image(x))
    for maker, make in makers.items():
        for name in formats:
            given = tuple(x.to(memory_format=FORMATS[name]) if _is_image(x) else x for x in inputs)
            model = make().to(like.device, like.dtype).to(memory_format=FORMATS[name])
            found[f"{maker} {name}"] = Candidate(model, model, given)
            if maker in compiles:
                found[f"{maker} compiled {name}"] = Candidate(model, compiled(model), given)
    return found


def _is_image(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 4


def accelerated(make: Callable[[], torch.nn.Module]) -> Callable[[], torch.nn.Module]:
    def made() -> torch.nn.Module:
        model = make()
        accelerate(model)
        return model

    return made


def ddpm(dtype: torch.dtype, device: str, dry: bool, compiles: bool = True) -> dict[str, Candidate]:
    """The architecture of DDPM for CIFAR-10, with eight images of 32 x 32: ours, and diffusers', as it is, accelerated.

    Where diffusers is not installed, ours of PyTorch's operations. On a GPU it is channels_last alone, for the time
    that ``make gpu-check`` has.
    """
    ours = {"in_channels": 3, **(OUR_SMALL if dry else OUR_CIFAR10)}
    config = {**CIFAR10, **(SMALL if dry else {})}
    size, formats = 8 if dry else 32, ("channels_last",) if device == "cuda" else tuple(FORMATS)
    inputs = torch.randn(8, 3, size, size, dtype=dtype, device=device), torch.randint(1000, (8,), device=device)
    compiled_ones = ("ours", "PyTorch", "diffusers") if compiles and not dry else ()

    def theirs() -> torch.nn.Module:
        return diffusers.UNet2DModel(**config)

    def made() -> torch.nn.Module:
        return nn.UNet(**ours)

    if diffusers is None:
        return variants({"ours": made, "PyTorch": lambda: plain(made())}, inputs, compiled_ones, formats)
    found = variants({"ours": made, "diffusers": theirs}, inputs, compiled_ones, formats)
    return found | variants({"accelerated diffusers": accelerated(theirs)}, inputs, (), ("channels_last",))


def skip_on_a_gpu(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype != torch.bfloat16:
        pytest.skip("bfloat16 alone on a GPU, for the time that make gpu-check has")


class Report:
    """Runs the networks in turn, and tells what it found to pytest-benchmark and to the terminal."""

    def __init__(self, benchmark: Any, capsys: Any, device: str, dry: bool):
        self.benchmark, self.capsys, self.device, self.dry = benchmark, capsys, device, dry

    def __call__(
        self,
        calls: dict[str, Callable[[], Any]],
        rounds: int,
        warm: dict[str, Callable[[], Any]] | None = None,
        **more: Any,
    ) -> None:
        """``warm`` are calls to warm up with, in which what is to be compiled is; left out, ``calls``."""
        rounds = 1 if self.dry else rounds
        for call in () if self.dry else (warm or calls).values():
            call()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                self._wait()
                begin = time.perf_counter()
                call()
                self._wait()
                seconds[name].append(time.perf_counter() - begin)
        timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
        base = timings[OURS]
        ratios = {name: base.ratio_of(timing) for name, timing in timings.items()}
        self.benchmark.extra_info.update(
            seconds={name: timing.median for name, timing in timings.items()},
            ratios=ratios,
            rounds=rounds,
            device=self.device,
            threads=torch.get_num_threads(),
            **more,
        )
        peers = [name for name in timings if not name.startswith(("ours", "accelerated"))]
        best = min(peers, key=lambda name: timings[name].median)
        lines = [f"{name:44} {1e3 * timings[name].median:10.2f} ms {ratios[name]:6.2f}x" for name in timings]
        lines.append(f"the best peer is {best}; ours takes {1 / ratios[best]:.2f} of its time")
        lines += [f"{name}: {value}" for name, value in more.items()]
        with self.capsys.disabled():
            print("\n  " + "\n  ".join(lines))
        self.benchmark.pedantic(calls[OURS], rounds=rounds, iterations=1, warmup_rounds=0)

    def _wait(self) -> None:
        if self.device == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize()


@pytest.fixture
def report(benchmark: Any, capsys: Any, device: str, request: pytest.FixtureRequest) -> Any:
    if device != request.config.getoption("device"):
        pytest.skip("a network takes the emulator minutes")
    # Before it may be used up by other benchmarks: the compiler gives up on a function compiled for many shapes.
    torch.compiler.reset()
    yield Report(benchmark, capsys, device, request.config.getoption("dry_run"))
    torch.compiler.reset()


_NORM = ("gencore::group_norm", "aten::group_norm", "aten::native_group_norm", "aten::silu")
_CONVOLUTION = ("aten::conv2d", "aten::convolution", "aten::_convolution")
_ATTENTION = ("SpatialSelfAttention", "PlainAttention", "Attention")


def shares(candidate: Candidate, device: str) -> dict[str, str]:
    """Of the time of a forward pass, what goes to convolutions, attention with its projections, norms with SiLU, rest.

    A norm within attention counts as a norm, and an operation as what it is part of.
    """
    scopes: list[Any] = []

    def begin(*_: Any) -> None:
        scopes.append(torch.profiler.record_function("attention").__enter__())

    def end(*_: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    hooks = [
        hook
        for module in candidate.model.modules()
        if type(module).__name__ in _ATTENTION
        for hook in (module.register_forward_pre_hook(begin), module.register_forward_hook(end))
    ]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda" and torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        with torch.no_grad():
            candidate()
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(3):
                    candidate()
    finally:
        for hook in hooks:
            hook.remove()
    found = dict.fromkeys(("convolution", "attention", "norm", "other"), 0.0)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent = event.self_device_time_total if len(activities) > 1 else event.self_cpu_time_total
            found[_kind(event)] += spent
    total = sum(found.values())
    return {kind: f"{spent / 3e3:.1f} ms, {spent / total:.0%}" for kind, spent in found.items()}


def _kind(event: Any) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for kind, of_kind in (("norm", _NORM), ("attention", ("attention",)), ("convolution", _CONVOLUTION)):
        if any(name in of_kind for name in names):
            return kind
    return "other"


def eager(candidates: dict[str, Candidate], device: str) -> dict[str, Any]:
    """Where the time goes in the networks that are not compiled, in channels_last."""
    names = [name for name in candidates if name.endswith("channels_last") and "compiled" not in name]
    return {f"{name}, of which": shares(candidates[name], device) for name in names}


def floor(candidate: Candidate, device: str) -> dict[str, float]:
    """Seconds that the network's products of matrices and convolutions take at the rate of a large product."""

    def of_attention(qkv: Any, num_heads: int, *_: Any, **__: Any) -> int:
        pixels = qkv[2] * qkv[3]
        return 4 * qkv[0] * pixels * pixels * qkv[1] // 3

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.gencore.spatial_attention.default: of_attention})
    with torch.no_grad(), counter:
        candidate.model(*candidate.inputs)
    flops = counter.get_total_flops()
    dtype = next(candidate.model.parameters()).dtype
    return {"gflop": flops / 1e9, "floor_seconds": limits.matmul_floor(flops, dtype, device)}


def forward(candidate: Candidate) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            candidate()

    return call


@dtypes
def test_forward(dtype, device, report):
    skip_on_a_gpu(device, dtype)
    candidates = ddpm(dtype, device, report.dry)
    told = {**floor(candidates[OURS], device), **eager(candidates, device)}
    report({name: forward(candidate) for name, candidate in candidates.items()}, 11, **told)


@dtypes
def test_forward_backward(dtype, device, report):
    """The squared error, and its gradient for every parameter."""
    skip_on_a_gpu(device, dtype)
    candidates = ddpm(dtype, device, report.dry, compiles=device == "cpu")

    def run(candidate: Candidate) -> Callable[[], Any]:
        candidate.model.train()

        def call() -> None:
            candidate.model.zero_grad(set_to_none=True)
            candidate().square().mean().backward()

        return call

    report({name: run(candidate) for name, candidate in candidates.items()}, 7)


@dtypes
def test_sampling(dtype, device, report):
    """DDIM in 50 steps: ours by our loop, diffusers' by its scheduler."""
    skip_on_a_gpu(device, dtype)
    candidates = ddpm(dtype, device, report.dry, compiles=device == "cpu")

    def run(name: str, candidate: Candidate, steps: int) -> Callable[[], Any]:
        x = candidate.inputs[0]
        if "diffusers" not in name:
            sampler = diffusion.ddim(diffusion.linear(), steps, clip=1.0, spacing="leading")
            options = {"dtype": dtype, "device": device, "memory_format": FORMATS[name.split()[-1]]}
            return lambda: diffusion.sample(candidate.run, tuple(x.shape), sampler, Key(0), **options)
        scheduler = diffusers_scheduler("DDIMScheduler", device, steps)
        if name.startswith("accelerated"):
            accelerate(scheduler)

        @torch.no_grad()
        def theirs() -> None:
            state = torch.randn_like(x)
            for t in scheduler.timesteps:
                state = scheduler.step(candidate.run(state, t)[0], t, state).prev_sample

        return theirs

    calls, warm = (
        {name: run(name, candidate, steps) for name, candidate in candidates.items()}
        for steps in (2 if report.dry else STEPS, 2)
    )
    report(calls, 1 if device == "cpu" else 5, warm)


def _only_on_a_gpu(device: str, dry: bool) -> None:
    if device == "cpu" and not dry:
        pytest.skip("minutes on a CPU")


def test_stable_diffusion(device, report):
    """One call of the U-Net of Stable Diffusion 1.5 in bfloat16 for two images of 512 x 512."""
    _only_on_a_gpu(device, report.dry)
    dtype, size = torch.bfloat16, 8 if report.dry else 64
    ours = {"in_channels": 4, **(OUR_SMALL if report.dry else OUR_STABLE_DIFFUSION)}
    x, t = torch.randn(2, 4, size, size, dtype=dtype, device=device), torch.randint(1000, (2,), device=device)
    candidates = _equivalent(lambda: nn.UNet(**ours), (x, t), report.dry)
    if diffusers is not None:
        # Other than ours it has transformer blocks: its own figures are compared with each other.
        context = torch.randn(2, 77, 768, dtype=dtype, device=device)
        config = STABLE_DIFFUSION
        if report.dry:
            blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
            config = {**config, **SMALL, **blocks, "block_out_channels": (8,), "attention_head_dim": 2}

        def theirs() -> torch.nn.Module:
            return diffusers.UNet2DConditionModel(**config)

        makers = {"diffusers": theirs, "accelerated diffusers": accelerated(theirs)}
        candidates |= variants(makers, (x, t, context), () if report.dry else ("diffusers",), ("channels_last",))
    _report_forward(report, candidates, device)


def test_autoencoder(device, report):
    """The decoder of Stable Diffusion's autoencoder in bfloat16 for an image of 1024 x 1024."""
    _only_on_a_gpu(device, report.dry)
    size = 4 if report.dry else 128
    x = torch.randn(1, 4, size, size, dtype=torch.bfloat16, device=device)
    channels, blocks, groups = ((8, 16), 2, 4) if report.dry else ((128, 256, 512, 512), 3, 32)
    candidates = _equivalent(lambda: Decoder(channels, blocks, groups), (x,), report.dry)
    if diffusers is not None:
        config = {"latent_channels": 4, **(SMALL_AUTOENCODER if report.dry else AUTOENCODER)}

        def theirs() -> torch.nn.Module:
            return diffusers.AutoencoderKL(**config).decoder

        makers = {"diffusers": theirs, "accelerated diffusers": accelerated(theirs)}
        candidates |= variants(makers, (x,), () if report.dry else ("diffusers",), ("channels_last",))
    _report_forward(report, candidates, device)


def _equivalent(ours: Callable[[], torch.nn.Module], inputs: tuple[Any, ...], dry: bool) -> dict[str, Candidate]:
    return variants(
        {"ours": ours, "PyTorch": lambda: plain(ours())}, inputs, () if dry else ("PyTorch",), ("channels_last",)
    )


def _report_forward(report: Report, candidates: dict[str, Candidate], device: str) -> None:
    told = eager(candidates, device)
    report({name: forward(candidate) for name, candidate in candidates.items()}, 15, **told)
