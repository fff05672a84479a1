"""What counts as an int, and that every function takes NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gencore import Key, diffusion, nn, ops
from gencore.arguments import as_int, integer
from gencore.models.vae import VAE, VAEConfig
from gencore.spec import DataSpec


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), np.gcd(6, 9)])
def test_what_is_an_int(value):
    assert type(as_int(value)) is int
    assert integer("n", value) == 3


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float32(3), np.array([3]), torch.tensor(3), "3", None])
def test_what_is_none(value):
    assert as_int(value) is None
    with pytest.raises(TypeError, match=f"n must be an int, got {type(value).__name__}"):
        integer("n", value)


def test_the_least_is_held():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        integer("n", np.int32(0), least=1)


X, STATE = torch.randn(2, 6, 4), torch.randn(2, 3)
SCHEDULE = diffusion.linear(10)
MODEL = VAE(VAEConfig(hidden_sizes=(4,), latent_size=2), DataSpec((1, 2, 2)))
Int, Float = np.int64, np.float32


@pytest.mark.parametrize(
    ("with_numpy", "without"),
    [
        (lambda: ops.group_norm(X, Int(2), eps=Float(0.5)), lambda: ops.group_norm(X, 2, eps=0.5)),
        (
            lambda: ops.attention(X[None], X[None], X[None], scale=Float(0.5)),
            lambda: ops.attention(*[X[None]] * 3, scale=0.5),
        ),
        (lambda: ops.spatial_attention(X, np.uint8(2)), lambda: ops.spatial_attention(X, 2)),
        (
            lambda: ops.reparameterize(X, X, Key(Int(1)), num_samples=Int(2)),
            lambda: ops.reparameterize(X, X, Key(1), num_samples=2),
        ),
        (lambda: ops.normal((Int(2), np.int8(3)), Key(1)), lambda: ops.normal((2, 3), Key(1))),
        (lambda: ops.uniform(np.array([2, 3]), Key(1)), lambda: ops.uniform((2, 3), Key(1))),
        (lambda: ops.add_noise(STATE, Int(4), SCHEDULE, Key(1)), lambda: ops.add_noise(STATE, 4, SCHEDULE, Key(1))),
        (
            lambda: diffusion.sample(
                lambda x, t: x, (Int(2), Int(3)), diffusion.ddpm(SCHEDULE, Int(5)), Key(1), resamples=Int(2)
            ),
            lambda: diffusion.sample(lambda x, t: x, (2, 3), diffusion.ddpm(SCHEDULE, 5), Key(1), resamples=2),
        ),
        (
            lambda: diffusion.heun(SCHEDULE, Int(3), spacing="karras").rows,
            lambda: diffusion.heun(SCHEDULE, 3, spacing="karras").rows,
        ),
        (lambda: diffusion.ddim(SCHEDULE, np.array([7, 2])).rows, lambda: diffusion.ddim(SCHEDULE, [7, 2]).rows),
        (
            lambda: torch.tensor(diffusion.timesteps(Int(10), Int(3), "leading", Int(1))),
            lambda: torch.tensor(diffusion.timesteps(10, 3, "leading", 1)),
        ),
        (lambda: diffusion.cosine(Int(5)).alpha, lambda: diffusion.cosine(5).alpha),
        (lambda: MODEL.sample(Int(3), Key(1)), lambda: MODEL.sample(3, Key(1))),
    ],
)
def test_numpy_numbers_are_numbers(with_numpy, without):
    assert torch.equal(with_numpy(), without())


def test_modules_keep_ints_where_they_are_given_numpys():
    unet = nn.UNet(
        in_channels=Int(3), out_channels=Int(2), channels=(Int(16), np.int32(32)), blocks_per_level=Int(1),
        num_groups=np.gcd(16, 32), attention_levels=[Int(1)], head_size=Int(8), num_classes=Int(2),
        embedding_size=Int(8),
    )  # fmt: skip
    assert unet(torch.zeros(1, 3, 4, 4), torch.zeros(1)).shape == (1, 2, 4, 4)
    kept = [value for module in unet.modules() for value in vars(module).values()]
    kept += [one for value in kept if isinstance(value, (tuple, list)) for one in value]
    assert not [value for value in kept if isinstance(value, np.generic)]
    cross = nn.SpatialCrossAttention(Int(8), Int(4), num_heads=Int(2), num_groups=Int(4))
    assert type(cross.num_heads) is type(cross.norm.num_groups) is int


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.group_norm(X, True),
        lambda: ops.spatial_attention(X, np.True_),
        lambda: nn.GroupNorm(True, 6),
        lambda: nn.UNet(in_channels=3, channels=(True,)),
        lambda: diffusion.linear(True),
        lambda: diffusion.ddpm(SCHEDULE, True),
        lambda: ops.normal((True, 3), Key(1)),
        lambda: MODEL.sample(True, Key(1)),
    ],
)
def test_bools_are_none(call):
    with pytest.raises(TypeError):
        call()
