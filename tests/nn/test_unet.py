"""The U-Net and its blocks."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from support import same_bits
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from gencore import nn
from gencore.nn.embedding import TimeEmbedding, timestep_embedding
from gencore.nn.residual import Downsample, ResidualBlock, Upsample

SMALL = {"channels": (8, 16, 16), "attention_levels": (1,), "num_groups": 4, "blocks_per_level": 1}


def randomized(module, seed=0):
    """The module with every parameter random, so that nothing is hidden behind a zero, and values of size 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                values /= math.sqrt(parameter[0].numel())
            else:
                values = 0.3 * values + (1 if "norm" in name and name.endswith("weight") else 0)
            parameter.copy_(values)
    return module


def images(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_embedding_is_its_formula():
    t, size = torch.tensor([0, 1, 999]), 10
    e = timestep_embedding(t, size, dtype=torch.float64)
    for n, time in enumerate((0, 1, 999)):
        for i in range(5):
            angle = time * 10000 ** (-i / 4)
            # A frequency, rounded a few times, is multiplied by up to 999.
            assert e[n, i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert e[n, 5 + i].item() == pytest.approx(math.cos(angle), abs=1e-12)
    # As many units in the last place of a float32 as the steps of the time: 999 * 4 * 2^-24.
    torch.testing.assert_close(timestep_embedding(t, size), e.float(), rtol=0, atol=999 * 2**-22)
    # Without the shift the last frequency is not reached.
    last = timestep_embedding(t, size, frequency_shift=0, dtype=torch.float64)[1, 4].item()
    assert last == pytest.approx(math.sin(10000 ** (-4 / 5)), abs=1e-12)


def test_the_embedding_takes_any_type_of_time():
    whole = timestep_embedding(torch.tensor([3, 40]), 8)
    for dtype in (torch.int32, torch.float32, torch.float64, torch.bfloat16):
        assert same_bits(timestep_embedding(torch.tensor([3, 40], dtype=dtype), 8), whole)
    half = TimeEmbedding(64, 64).to(torch.bfloat16)
    near = half(torch.tensor([998, 999]))
    assert near.dtype == torch.bfloat16
    # bfloat16 has no 999: had the time been rounded to it, the two would be one.
    assert not torch.equal(near[0], near[1])


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("channels", [(8, 8), (8, 12)])
def test_a_residual_block_is_its_formula(channels, scale_shift):
    block = randomized(ResidualBlock(*channels, 6, num_groups=4, scale_shift=scale_shift).double())
    x, embedding = images(2, channels[0], 5, 4, dtype=torch.float64), images(2, 6, dtype=torch.float64)
    h = F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    e = (embedding @ block.embedding.weight.T + block.embedding.bias)[..., None, None]
    if scale_shift:
        h = F.group_norm(h, 4, block.norm2.weight, block.norm2.bias)
        h = h * (1 + e[:, : channels[1]]) + e[:, channels[1] :]
    else:
        h = F.group_norm(h + e, 4, block.norm2.weight, block.norm2.bias)
    h = F.conv2d(F.silu(h), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = x if channels[0] == channels[1] else F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    # float64, sums of at most 8 * 9 products.
    # Some hundred operations in float64, of 1e-16 each.
    torch.testing.assert_close(block(x, embedding), shortcut + h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 5), (1, 3)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_halving_rounds_up_and_doubling_goes_back(size, asymmetric):
    x = images(2, 4, *size)
    down = Downsample(4, asymmetric=asymmetric)
    half = down(x)
    assert half.shape == (2, 4, (size[0] + 1) // 2, (size[1] + 1) // 2)
    # The first value sees the pixels from 0 on, or from -1 on, which is padding.
    before = [0 if asymmetric and side % 2 == 0 else 1 for side in size]
    padded = F.pad(x, (before[1], 2, before[0], 2))[..., :3, :3]
    first = torch.einsum("nchw,ochw->no", padded, down.conv.weight) + down.conv.bias
    # Sums of 36 products of size 1 / 6, in another order.
    # Sums of 36 products in float32.
    torch.testing.assert_close(half[..., 0, 0], first, rtol=1e-5, atol=1e-5)
    assert Upsample(4)(half, x.shape[-2:]).shape == x.shape


def test_doubling_takes_the_nearest_pixel():
    up = Upsample(2)
    x = images(1, 2, 2, 2)
    wide = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(up(x, torch.Size((4, 4))), up.conv(wide))


@pytest.mark.parametrize("size", [(28, 28), (7, 7), (9, 6), (1, 1), (3, 16)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": (8,), "attention_levels": ()},
        {"scale_shift": True, "num_heads": 2, "attention_levels": (0, 2)},
        {"out_channels": 4, "num_classes": 3, "asymmetric_downsampling": True, "blocks_per_level": 2},
        {"head_size": 4, "middle_attention": False, "embedding_size": 6, "channels": (16, 8), "frequency_shift": 0},
    ],
    ids=str,
)
def test_any_size_comes_back(size, options):
    unet = nn.UNet(in_channels=2, **{**SMALL, **options})
    x, t = images(3, 2, *size), torch.tensor([0, 5, 999])
    y = unet(x, t)
    assert y.shape == (3, options.get("out_channels", 2), *size)
    # The last convolution begins as zero.
    assert not y.any()
    y = randomized(unet)(x, t)
    assert y.isfinite().all()
    assert y.all()


def test_blocks_begin_as_the_identity():
    x = images(2, 8, 5, 5)
    assert torch.equal(ResidualBlock(8, 8, 6, num_groups=4)(x, torch.randn(2, 6)), x)
    assert torch.equal(nn.SpatialSelfAttention(8, num_groups=4)(x), x)
    assert torch.equal(nn.SpatialCrossAttention(8, 3, num_groups=4)(x, torch.randn(2, 4, 3)), x)


def test_samples_do_not_see_each_other():
    unet = randomized(nn.UNet(in_channels=1, num_classes=3, **SMALL)).double()
    x, t, labels = images(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 7, 500, 999]), torch.tensor([0, 2, -1, 1])
    y = unet(x, t, labels)
    alone = unet(x[2:3], t[2:3], labels[2:3])
    # As above, in the whole network.
    torch.testing.assert_close(y[2:3], alone, rtol=1e-12, atol=1e-12)
    # And each is told its own time step and label.
    assert not torch.allclose(unet(x, t.flip(0), labels), y)
    assert not torch.allclose(unet(x, t, labels.flip(0)), y)


def test_no_label_is_the_null_label():
    unet = randomized(nn.UNet(in_channels=1, num_classes=3, **SMALL))
    x, t = images(2, 1, 8, 8), torch.tensor([1, 2])
    none = unet(x, t)
    assert torch.equal(unet(x, t, torch.tensor([-1, -1])), none)
    results = [unet(x, t, torch.tensor([label] * 2)) for label in (-1, 0, 1, 2)]
    for i, a in enumerate(results):
        assert not any(torch.allclose(a, b) for b in results[:i])


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_channels_last_is_kept_and_gives_the_same(in_channels, scale_shift):
    unet = randomized(nn.UNet(in_channels=in_channels, scale_shift=scale_shift, num_classes=2, **SMALL)).double()
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    x, t, labels = images(2, in_channels, 9, 6, dtype=torch.float64), torch.tensor([3, 40]), torch.tensor([1, 0])
    strides = []
    for module in last.modules():
        if isinstance(module, ResidualBlock | nn.SpatialSelfAttention | Upsample | Downsample):
            module.register_forward_hook(
                lambda *of: strides.append(of[2].is_contiguous(memory_format=torch.channels_last))
            )
    want, y = unet(x, t, labels), last(x.to(memory_format=torch.channels_last), t, labels)
    assert len(strides) > 10
    assert all(strides)
    assert want.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last)
    # float64, some 20 layers with sums of a few hundred values in another order.
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    for module, in_format in ((unet, torch.contiguous_format), (last, torch.channels_last)):
        module(x.to(memory_format=in_format), t, labels).square().mean().backward()
    for a, b in zip(unet.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_gradient_flows_to_every_parameter(scale_shift):
    unet = randomized(nn.UNet(in_channels=1, num_classes=3, scale_shift=scale_shift, **SMALL))
    x = images(4, 1, 8, 8).requires_grad_()
    unet(x, torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, -1])).square().mean().backward()
    for name, parameter in [*unet.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("scale_shift", [False, True])
def test_gradcheck(scale_shift):
    options = {"channels": (4, 4), "attention_levels": (1,), "num_groups": 2, "blocks_per_level": 1}
    unet = randomized(nn.UNet(in_channels=1, num_classes=2, scale_shift=scale_shift, **options)).double()
    t, labels = torch.tensor([3, 4]), torch.tensor([1, -1])
    names, parameters = zip(*unet.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(unet, dict(zip(names, values, strict=True)), (x, t, labels))

    x = images(2, 1, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_learns():
    torch.manual_seed(0)
    unet = nn.UNet(in_channels=1, num_classes=2, dropout=0.1, **SMALL)
    x, t, labels = images(8, 1, 8, 8), torch.arange(8), torch.arange(8) % 2
    target = images(8, 1, 8, 8, seed=2)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (unet(x, t, labels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item())
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_is_for_training_and_follows_the_seed():
    unet = randomized(nn.UNet(in_channels=1, dropout=0.5, **SMALL))
    x, t = images(2, 1, 8, 8), torch.tensor([1, 2])
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(unet(x, t))
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])
    unet.eval()
    without = nn.UNet(in_channels=1, **SMALL)
    without.load_state_dict(unet.state_dict())
    assert torch.equal(unet(x, t), unet(x, t))
    assert torch.equal(unet(x, t), without(x, t))


@pytest.mark.parametrize(
    ("options", "memory_format"),
    [
        ({"num_classes": 3}, torch.channels_last),
        ({"scale_shift": True, "asymmetric_downsampling": True}, torch.contiguous_format),
    ],
    ids=["classes", "scale and shift"],
)
def test_compiles_as_one_graph(options, memory_format):
    torch._dynamo.reset()
    unet = randomized(nn.UNet(in_channels=1, **{**SMALL, **options})).to(memory_format=memory_format)
    labels = torch.tensor([1, -1]) if "num_classes" in options else None
    x, t = images(2, 1, 7, 6).contiguous(memory_format=memory_format), torch.tensor([3, 400])
    want = unet(x, t, labels)
    (want_gradient,) = torch.autograd.grad(want.square().mean(), unet.conv_in.weight)
    # What the compiler makes of the graph is not ours: inductor takes a minute, and other tests give it our ops.
    y = torch.compile(unet, fullgraph=True, backend="aot_eager")(x, t, labels)
    (gradient,) = torch.autograd.grad(y.square().mean(), unet.conv_in.weight)
    # float32 values of size 1, some 20 layers with sums of a hundred values in another order, each rounded by 2^-24.
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-3, atol=1e-4)


def test_autocast_and_half_precision():
    unet = randomized(nn.UNet(in_channels=1, num_classes=3, **SMALL))
    x, t, labels = images(2, 1, 8, 8), torch.tensor([3, 400]), torch.tensor([0, -1])
    want = unet(x, t, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = unet(x, t, labels)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in unet.parameters())
    half = copy.deepcopy(unet).to(torch.bfloat16)(x.bfloat16(), t, labels)
    assert half.dtype == torch.bfloat16
    for result in (y, half):
        error = (result.float() - want).square().mean().sqrt() / want.square().mean().sqrt()
        # Some 20 layers round their values and their weights to 8 bits: 40 errors of at most 2^-9 on a random walk.
        assert error < math.sqrt(40) * 2**-9


def test_the_state_dict_names_follow_the_scheme():
    unet = nn.UNet(in_channels=1, num_classes=3, **SMALL)
    affine = "weight|bias"
    residual = rf"(norm1|conv1|embedding|norm2|conv2|shortcut)\.({affine})"
    attention = rf"(norm|qkv|out)\.({affine})"
    scheme = re.compile(
        rf"(time_embedding\.linear[12]|conv_in|norm_out|conv_out)\.({affine})"
        r"|class_embedding\.weight"
        rf"|(down|up)\.\d+\.residual\.\d+\.{residual}"
        rf"|(down|up)\.1\.attention\.\d+\.{attention}"
        rf"|middle\.residual\.[01]\.{residual}|middle\.attention\.0\.{attention}"
        rf"|down\.[01]\.downsample\.conv\.({affine})|up\.[12]\.upsample\.conv\.({affine})"
    )
    state = unet.state_dict()
    assert [name for name in state if not scheme.fullmatch(name)] == []
    assert state["class_embedding.weight"].shape == (4, 32)
    # The number of a level is its resolution, on the way down and up.
    for level, channels in enumerate((8, 16, 16)):
        assert state[f"down.{level}.residual.0.conv2.weight"].shape[0] == channels
        assert state[f"up.{level}.residual.1.conv2.weight"].shape[0] == channels
    # The last block of level 1 going up is given 16 channels and the 8 that level 0 handed down.
    assert state["up.1.residual.1.conv1.weight"].shape[1] == 24


def test_a_state_dict_survives_and_copies():
    unet, other = randomized(nn.UNet(in_channels=1, **SMALL)), nn.UNet(in_channels=1, **SMALL)
    x, t = images(2, 1, 8, 8), torch.tensor([1, 2])
    other.load_state_dict(unet.state_dict())
    assert torch.equal(other(x, t), unet(x, t))
    assert torch.equal(copy.deepcopy(unet)(x, t), unet(x, t))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"in_channels": 1.0}, TypeError, "in_channels must be an int, got float"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1, got 0"),
        ({"channels": ()}, ValueError, "channels must name at least one level, got ()"),
        ({"channels": 64}, TypeError, "channels must be a sequence of ints, got 64"),
        ({"channels": (8, 10)}, ValueError, "channels must be multiples of num_groups=4, got (8, 10)"),
        ({"channels": (0, 8)}, ValueError, "channels must be multiples of num_groups=4, got (0, 8)"),
        ({"channels": (9,) * 3, "num_groups": 3}, ValueError, "channels[0] must be even, for as many sines"),
        ({"blocks_per_level": 0}, ValueError, "blocks_per_level must be at least 1, got 0"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"attention_levels": (3,)}, ValueError, "attention_levels must be different levels from 0 to 2, got (3,)"),
        ({"attention_levels": (-1,)}, ValueError, "attention_levels must be different levels from 0 to 2, got (-1,)"),
        ({"attention_levels": (1, 1)}, ValueError, "attention_levels must be different levels from 0 to 2, got (1, 1)"),
        ({"num_heads": 3}, ValueError, "num_heads must divide the 16 channels of level 1, got 3"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"head_size": 5}, ValueError, "head_size must divide the 16 channels of level 1, got 5"),
        ({"head_size": 0}, ValueError, "head_size must be at least 1, got 0"),
        ({"num_heads": 2, "head_size": 8}, ValueError, "num_heads and head_size must not both be given, got 2 and 8"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"embedding_size": 0}, ValueError, "embedding_size must be at least 1, got 0"),
        ({"frequency_shift": 4}, ValueError, "frequency_shift must be at least 0 and less than channels[0] / 2 = 4, "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_says_what_is_wrong_with_the_architecture(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nn.UNet(**{"in_channels": 1, **SMALL, **options})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, ValueError, "x must have the shape (N, 1, H, W), got (2, 3, 8, 8)"),
        ({"x": torch.zeros(1, 8, 8)}, ValueError, "x must have the shape (N, 1, H, W), got (1, 8, 8)"),
        ({"t": torch.tensor(3)}, ValueError, "t must have one time step per sample of x, the shape (2,), got ()"),
        ({"t": torch.tensor([3])}, ValueError, "t must have one time step per sample of x, the shape (2,), got (1,)"),
        ({"labels": torch.tensor([3])}, ValueError, "labels must have the shape (2,), one per sample of x, got (1,)"),
        ({"labels": torch.zeros(2)}, TypeError, "labels must be int64, got torch.float32"),
        ({"labels": torch.tensor([0, 3])}, ValueError, "labels must be from 0 to 2, or -1 for none, got [0, 3]"),
        ({"labels": torch.tensor([-2, 0])}, ValueError, "labels must be from 0 to 2, or -1 for none, got [-2, 0]"),
    ],
)
def test_says_what_is_wrong_with_a_call(changes, error, message):
    unet = nn.UNet(in_channels=1, num_classes=3, **SMALL)
    arguments = {"x": torch.zeros(2, 1, 8, 8), "t": torch.tensor([0, 1]), "labels": torch.tensor([0, 2]), **changes}
    with pytest.raises(error, match=re.escape(message)):
        unet(**arguments)


def test_labels_are_for_models_with_classes():
    with pytest.raises(ValueError, match=re.escape("labels must be None for a model without classes (num_classes=0)")):
        nn.UNet(in_channels=1, **SMALL)(torch.zeros(1, 1, 8, 8), torch.tensor([0]), torch.tensor([0]))


def test_blocks_say_what_is_wrong():
    with pytest.raises(ValueError, match="size must be even and at least 2, got 7"):
        TimeEmbedding(7, 8)
    with pytest.raises(ValueError, match="frequency_shift must be at least 0 and less than size / 2 = 1"):
        TimeEmbedding(2, 8)
    with pytest.raises(ValueError, match="embedding_size must be at least 1, got 0"):
        TimeEmbedding(8, 0)
    for t, size, shift, message in (
        (torch.zeros(2, 1), 8, 1.0, r"t must have the shape \(N,\), got \(2, 1\)"),
        (torch.zeros(2), 7, 1.0, "size must be even and at least 2, got 7"),
        (torch.zeros(2), 8, 4.0, "frequency_shift must be at least 0 and less than size / 2 = 4, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            timestep_embedding(t, size, frequency_shift=shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_model", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("of_images", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_have_the_strides_of_their_parameters(of_model, of_images, dtype):
    """DistributedDataParallel copies a gradient that has not, and warns."""
    unet = nn.UNet(
        in_channels=3, channels=(8, 16), attention_levels=(1,), num_groups=4, num_classes=2, blocks_per_level=1
    )
    unet = unet.to(dtype).to(memory_format=of_model)
    x = torch.randn(2, 3, 8, 8, dtype=dtype).to(memory_format=of_images)
    unet(x, torch.zeros(2), torch.tensor([0, -1])).square().mean().backward()
    others = [name for name, weight in unet.named_parameters() if weight.grad.stride() != weight.stride()]
    assert others == []


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 3, "attention_levels": (1,)},
        {"scale_shift": True, "asymmetric_downsampling": True, "dropout": 0.1},
    ],
)
def test_symbolic_trace(options):
    unet = nn.UNet(in_channels=3, channels=(8, 16), num_groups=4, blocks_per_level=1, **options).eval()
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    traced, x, t = torch.fx.symbolic_trace(unet), torch.randn(2, 3, 9, 8), torch.tensor([3, 500])
    for labels in (None, torch.tensor([0, -1])) if unet.num_classes else (None,):
        assert torch.equal(traced(x, t, labels), unet(x, t, labels))
    with pytest.raises(ValueError, match=r"x must have the shape \(N, 3, H, W\), got \(2, 2, 9, 8\)"):
        traced(x[:, :2], t)
    with pytest.raises(ValueError, match="labels must"):
        traced(x, t, torch.zeros(3, dtype=torch.int64))


def test_on_the_meta_device_and_of_fake_tensors():
    for mode in (lambda: torch.device("meta"), FakeTensorMode):
        with mode():
            unet = nn.UNet(in_channels=3, channels=(8, 16), num_groups=4, num_classes=2, attention_levels=(0,))
            assert unet(torch.empty(2, 3, 8, 8), torch.empty(2)).shape == (2, 3, 8, 8)
