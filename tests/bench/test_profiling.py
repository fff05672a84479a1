"""A profile divides all of a step's time, and gives each part to what took it."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from gencore import Key, data, ops, plugins
from gencore.bench import plain, profiling
from gencore.bench.profiling import (
    ATTENTION,
    CONVOLUTION,
    ELEMENTWISE,
    FAMILIES,
    NOISE,
    NORM,
    OPTIMISER,
    PRODUCT,
    PYTHON,
)
from gencore.config import field
from gencore.diffusion import linear
from gencore.models import GenerativeModel, ModelConfig, SamplingConfig
from gencore.spec import Batch, DataSpec
from gencore.train import TrainConfig, Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "_quick")

X, ROW, SCHEDULE = torch.zeros(64, 1 << 12), ops.step_coefficients(x=0.5, noise=0.1), linear(100)


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(profiling, "_SESSIONS", 1)


def trainer_of(name, folder, **settings):
    images = data.load("digits", "train")
    plugin = plugins.MODELS.load(name)
    return Trainer(
        plugin, plugin.config_of(settings), images, TrainConfig(batch_size=32), folder, data_name="digits", device="cpu"
    )


@pytest.fixture
def small(tmp_path):
    return trainer_of("ddpm", tmp_path, channels=[16, 16], num_groups=4, attention_levels=[1])


def shares(step, calls=9):
    """Of the time of a step, what each family takes."""
    step()
    found, _ = profiling._divided(step, calls, "cpu")
    medians = {family: statistics.median(seconds[family] for seconds in found) for family in FAMILIES}
    return {family: spent / sum(medians.values()) for family, spent in medians.items()}


def differentiated(function, *shapes):
    """Forward and backward."""
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    gradients = []

    def step():
        y = function(*inputs)
        gradients[:] = gradients or [torch.ones_like(y)]
        torch.autograd.grad(y, inputs, gradients[0])

    return step


@pytest.mark.parametrize("is_plain", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize(
    ("family", "step"),
    [
        (CONVOLUTION, differentiated(lambda x, w: F.conv2d(x, w, padding=1), (8, 32, 32, 32), (32, 32, 3, 3))),
        (PRODUCT, differentiated(lambda x, w: F.linear(x, w), (512, 512), (512, 512))),
        (ATTENTION, differentiated(lambda q, k, v: ops.attention(q, k, v), *3 * [(4, 4, 256, 64)])),
        (ATTENTION, differentiated(lambda qkv: ops.spatial_attention(qkv, 4), (4, 3 * 128, 16, 16))),
        (
            NORM,
            differentiated(
                lambda x, s, t, e: ops.group_norm(x, 8, scale=s, shift=t, bias_in=e, activation="silu"),
                (8, 64, 32, 32),
                *3 * [(8, 64)],
            ),
        ),
        (NOISE, lambda: ops.normal((64, 1 << 14), Key(0))),
        (NOISE, lambda: ops.diffusion_step(X, None, ROW, Key(0))),
        (NOISE, differentiated(lambda m, v: ops.reparameterize_kl(m, v, Key(0))[0], *2 * [(64, 1 << 12)])),
        (ELEMENTWISE, differentiated(lambda x, y: x * y + x.exp(), *2 * [(64, 1 << 12)])),
        (PYTHON, lambda: time.sleep(0.003)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_part_is_told_as_what_it_is(family, step, is_plain):
    if is_plain:
        with plain.operations():
            found = shares(step)
    else:
        found = shares(step)
    assert found[family] == max(found.values())
    assert found[family] > 0.6, found


def test_losses_with_their_gradients_and_noise():
    x0, t = torch.randn(16, 3, 32, 32), torch.randint(100, (16,))

    def loss(output):
        ops.add_noise(x0, t, SCHEDULE, Key(0))
        return ops.denoising_loss(output, x0, t, SCHEDULE, Key(0), parameterization="v")

    step = differentiated(loss, x0.shape)
    with plain.operations():
        assert shares(step)[NOISE] > 0.5
    assert shares(step)[NOISE] > 0.5


def test_a_gradient_of_a_gradient_belongs_to_the_same():
    x, weight = (torch.randn(512, 512).requires_grad_() for _ in range(2))

    def step():
        (gradient,) = torch.autograd.grad((x @ weight).square().sum(), x, create_graph=True)
        gradient.sum().backward(inputs=[weight])

    assert shares(step)[PRODUCT] > 0.6


def test_an_optimiser_and_the_data_are_told_apart():
    parameter = torch.nn.Parameter(torch.randn(1 << 18))
    parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.AdamW([parameter], fused=True)
    assert shares(adam.step)[OPTIMISER] > 0.6

    class Slow(data.NamedDataset):
        def __len__(self):
            return 4

        def batch(self, indices, key=None):
            seen.append(key)
            return Batch(torch.randn(1 << 20)[indices])

    seen, slow = [], Slow("slow", "train", DataSpec((1, 1, 1)))
    marked = profiling._Marked(slow)
    assert shares(lambda: marked.batch(torch.arange(4), Key(3)))[PYTHON] > 0.6
    assert all(key is not None and torch.equal(key.packed, Key(3).packed) for key in seen)
    assert (marked.spec, marked.name, len(marked)) == (slow.spec, "slow", 4)


@pytest.mark.parametrize("is_plain", [False, True], ids=["ours", "plain"])
def test_the_families_sum_to_the_time_of_the_step(small, is_plain):
    step, taken = profiling.training_step(small), []

    def timed():
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)

    if is_plain:
        with plain.operations():
            found = profiling._divided(timed, 5, "cpu")[0]
    else:
        found = profiling._divided(timed, 5, "cpu")[0]
    assert len(found) == 5
    assert all(list(seconds) == list(FAMILIES) and min(seconds.values()) >= 0 for seconds in found)
    # Of a call during which the machine does something else, the two may differ.
    ratios = [sum(seconds.values()) / wall for seconds, wall in zip(found, taken[1:], strict=True)]
    assert statistics.median(ratios) == pytest.approx(1, abs=0.03)


def test_a_profile_of_a_training_step(small, tmp_path):
    before = {name: getattr(ops, name) for name in plain.NAMES}
    state, step = torch.get_rng_state(), small.step
    found = profiling.profile(profiling.training_step(small), rounds=5, budget=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert before == {name: getattr(ops, name) for name in plain.NAMES}
    assert small.step > step
    assert not any(tmp_path.iterdir())
    for side in (found.before, found.after):
        assert sum(side.families.values()) == pytest.approx(side.seconds)
        assert side.interval[0] <= side.seconds <= side.interval[1]
        for family in (CONVOLUTION, PRODUCT, ATTENTION, NORM, NOISE, ELEMENTWISE, OPTIMISER, PYTHON):
            assert side.families[family] > 0, family
    assert found.ratio_interval[0] <= found.ratio <= found.ratio_interval[1]
    assert (found.rounds, found.families) == (5, FAMILIES)

    found.write(tmp_path / "new" / "profile.json", model="ddpm", device="cpu")
    told = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert (told["format"], told["version"], told["model"]) == ("gencore profile", 1, "ddpm")
    assert told["before"]["families"] == found.before.families
    assert told["machine"]["name"]
    assert told["versions"]["torch"] == torch.__version__


def test_little_is_of_no_known_family(small):
    for step in (profiling.training_step(small), profiling.sampling_step(small.model, 8, {})[0]):
        assert shares(step, 3)["other"] < 0.1


def test_the_profiler_does_not_change_the_way_of_a_call(small):
    """Our ops go the way to their kernels that they go without a profiler, whose cost is no part of theirs."""
    step = profiling.training_step(small)
    with profiling._marked_ops(), torch.profiler.profile() as profiler, profiling._unobserved("cpu"):
        step()
    assert not [event for event in profiler.events() if event.name.startswith("gencore::")]
    with torch.profiler.profile() as profiler:
        step()
    assert [event for event in profiler.events() if event.name.startswith("gencore::")]


def test_a_sampling_step(tmp_path):
    model = trainer_of("ddpm", tmp_path, channels=[8], num_groups=4).model
    own = model.sampling
    step, parts = profiling.sampling_step(model, 3, {})
    assert parts == 10
    found = profiling.profile(step, parts=parts, rounds=5, budget=0.5)
    assert found.after.seconds < 0.1
    assert sum(found.after.families.values()) == pytest.approx(found.after.seconds)
    assert found.after.families[OPTIMISER] == 0
    assert OPTIMISER not in found.families
    assert step().shape == (3, 1, 8, 8)
    assert model.sampling is own
    assert own.steps is None
    for settings, steps in (({"sampling": {"steps": 4}}, 4), ({"timesteps": 5, "schedule": "cosine"}, 1)):
        model = trainer_of("ddpm", tmp_path, channels=[8], num_groups=4, **settings).model
        step, parts = profiling.sampling_step(model, 3, {})
        assert (parts, step().shape) == (steps, (3, 1, 8, 8))
    step, parts = profiling.sampling_step(trainer_of("vae", tmp_path, hidden_sizes=[8]).model, 3, {})
    assert (parts, step().shape) == (1, (3, 1, 8, 8))


def test_a_sampling_step_is_of_the_conditions_that_are_given(tmp_path):
    settings = {"channels": [8], "num_groups": 4, "conditional": True, "sampling": {"guidance_scale": 2.0}}
    model, sizes = trainer_of("ddpm", tmp_path, **settings).model, []
    model.unet.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    for conditions, images in (({}, 3), ({"label": torch.arange(3)}, 6)):
        step, parts = profiling.sampling_step(model, 3, conditions)
        sizes.clear()
        step()
        assert sizes == [images] * parts == [images] * 10, "guidance takes both predictions"


@dataclass(frozen=True)
class FewSteps(SamplingConfig):
    steps: int | None = field(None, ge=1, le=5)


class Fixed(GenerativeModel):
    sampling = FewSteps()

    def generate(self, draw):
        return torch.full((draw.n, *self.spec.image_shape), draw.sampling.steps or 0.5)


def test_settings_that_refuse_ten_steps_are_left_as_they_are():
    model = Fixed(ModelConfig(), DataSpec((1, 2, 2)))
    step, parts = profiling.sampling_step(model, 3, {})
    assert parts == 1
    assert torch.equal(step(), torch.full((3, 1, 2, 2), 0.5))
    model.sampling = FewSteps(4)
    step, parts = profiling.sampling_step(model, 3, {})
    assert parts == 4
    assert torch.equal(step(), torch.full((3, 1, 2, 2), 4.0))


def test_a_failure_leaves_everything_as_it_was(small):
    before = {name: getattr(ops, name) for name in plain.NAMES}

    def fail():
        if profiling.STEP and ops.normal is not before["normal"]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        profiling.profile(fail, rounds=5, budget=0.1)
    assert before == {name: getattr(ops, name) for name in plain.NAMES}
    with pytest.raises(ZeroDivisionError):
        profiling._divided(fail, 1, "cpu")
    assert before == {name: getattr(ops, name) for name in plain.NAMES}
    assert not torch.autograd.profiler._is_profiler_enabled


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("ConvolutionBackward0", CONVOLUTION),
        ("autograd::engine::evaluate_function: AddmmBackward0", PRODUCT),
        ("NativeGroupNormBackward0", NORM),
        ("ScaledDotProductFlashAttentionForCpuBackward0", ATTENTION),
        ("GeneratedBackwardFor_gencore_group_norm_defaultBackward", NORM),
        ("GeneratedBackwardFor_gencore_spatial_attention_defaultBackward", ATTENTION),
        ("GeneratedBackwardFor_gencore_denoising_loss_defaultBackward", NOISE),
        ("MulBackward0", ELEMENTWISE),
        ("SomethingElseBackward1", None),
    ],
)
def test_a_gradient_of_unknown_origin_is_told_by_its_name(name, family):
    assert profiling._of_node(name) == family
