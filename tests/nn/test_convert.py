"""A U-Net with the weights of diffusers' computes what diffusers' does."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from gencore import Key, diffusion, nn

diffusers = pytest.importorskip("diffusers")
attention_processor = importlib.import_module("diffusers.models.attention_processor")

# config.json of google/ddpm-cifar10-32.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
NARROW = {**CIFAR10, "block_out_channels": [32, 64, 64, 64]}
TINY = {
    **CIFAR10,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# float32, values of size 1. Each of some 60 layers rounds sums of up to 4600 products, in another order here and there:
# errors of 2^-24 on a random walk along the sum, which make some 1e-5 at most of the images' largest.
TOLERANCE = 1e-4


def theirs(config):
    """Their model, with every parameter random (those that begin as zero or one too) and values of size 1."""
    model = diffusers.UNet2DModel.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 and "class_embedding" not in name:
                values /= math.sqrt(parameter[0].numel())
            elif parameter.dim() == 1:
                values = 0.3 * values + (1 if "norm" in name and name.endswith("weight") else 0)
            parameter.copy_(values)
    return model.eval()


def old_names(state_dict):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {re.sub(r"to_(q|k|v|out\.0)", lambda found: old[found[0]], key): v for key, v in state_dict.items()}


@torch.no_grad()
def assert_same_function(model, unet, size=32, samples=3):
    x = torch.randn(samples, model.config["in_channels"], size, size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 517, 999][:samples])
    classes = model.config["num_class_embeds"]
    labels = None if classes is None else torch.arange(samples) % classes
    want = model(x, t, labels).sample
    assert want.std() > 0.3
    torch.testing.assert_close(unet(x, t, labels), want, rtol=0, atol=TOLERANCE)
    # At t = 0 the float32 of their time embedding is exact, so that all else can be compared in float64.
    want = model.double()(x.double(), 0 * t, labels).sample
    torch.testing.assert_close(unet.double()(x.double(), 0 * t, labels), want, rtol=0, atol=1e-12)


def test_the_architecture_of_ddpm_for_cifar10():
    model = theirs(CIFAR10)
    unet = nn.unet_from_diffusers(model)
    assert sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in model.parameters()) == 35_746_307
    assert_same_function(model, unet, samples=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1},
        {"attention_head_dim": 8, "out_channels": 6, "dropout": 0.3},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32, "in_channels": 1},
        {"resnet_time_scale_shift": "scale_shift", "add_attention": False},
        {"num_class_embeds": 5, "time_embedding_dim": 48, "layers_per_block": 1, "norm_num_groups": 16},
    ],
    ids=str,
)
def test_the_same_function(changes):
    model = theirs({**NARROW, **changes})
    assert_same_function(model, nn.unet_from_diffusers(model))


def test_a_published_file_has_old_names_and_a_short_configuration():
    model = theirs(NARROW)
    state_dict = old_names(model.state_dict())
    assert "mid_block.attentions.0.proj_attn.weight" in state_dict
    assert not any("to_" in name for name in state_dict)
    assert_same_function(model, nn.unet_from_diffusers(json.loads(json.dumps(NARROW)), state_dict))


def test_what_a_configuration_leaves_out_is_diffusers_default():
    config = {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    model = theirs(config)
    assert_same_function(model, nn.unet_from_diffusers(config, model.state_dict()), size=8)


def test_the_null_label_adds_nothing():
    model = theirs({**TINY, "num_class_embeds": 2})
    unet = nn.unet_from_diffusers(model)
    model.class_embedding.weight.data[1] = 0
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    torch.testing.assert_close(unet(x, t), model(x, t, torch.tensor([1, 1])).sample, rtol=0, atol=TOLERANCE)


def test_the_weights_are_copies_that_can_be_trained():
    model = theirs({**TINY, "dropout": 0.5})
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    unet = nn.unet_from_diffusers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not unet.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in unet.parameters())
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    half = nn.unet_from_diffusers(TINY, {name: tensor.bfloat16() for name, tensor in kept.items()})
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_what_comes_out_can_sample():
    """Straight in the loop, as docs/unet.md says; the images are those of diffusers' model."""
    model = theirs(TINY)
    unet = nn.unet_from_diffusers(model).to(memory_format=torch.channels_last)
    sampler = diffusion.ddim(diffusion.linear(1000), 4, clip=1.0)
    images = diffusion.sample(unet, (2, 3, 8, 8), sampler, Key(0), memory_format=torch.channels_last)
    want = diffusion.sample(lambda x, t: model(x, t).sample, (2, 3, 8, 8), sampler, Key(0))
    # One call differs by TOLERANCE, and x0 at most by 1 / alpha = 160 times that, less the clipping; later steps add
    # less and less.
    torch.testing.assert_close(images, want, rtol=0, atol=200 * TOLERANCE)
    assert images.std() > 0.1


def test_diffusers_is_not_needed():
    code = "import sys, gencore.nn; gencore.nn.unet_from_diffusers; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name: must be UNet2DModel, was UNet2DConditionModel"),
        ({"cross_attention_dim": 8}, "cross_attention_dim: is not known, was 8"),
        ({"center_input_sample": True}, "center_input_sample: must be False, was True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type: must be 'positional', was 'fourier'"),
        ({"mid_block_type": None}, "mid_block_type: must be 'UNetMidBlock2D', was None"),
        ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor: must be 1, was 1.4"),
        ({"downsample_padding": 2}, "downsample_padding: must be 0 or 1, was 2"),
        ({"downsample_type": "resnet"}, "downsample_type: must be 'conv', was 'resnet'"),
        ({"upsample_type": "resnet"}, "upsample_type: must be 'conv', was 'resnet'"),
        ({"act_fn": "gelu"}, "act_fn: must be 'silu' or 'swish', was 'gelu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type: must be None, was 'timestep'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift: must be 'default' or 'scale_shift', was"),
        (
            {"attn_norm_num_groups": 2},
            "attn_norm_num_groups: must be norm_num_groups, 4, for a norm like the others, was",
        ),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups: must be norm_num_groups, 4, for a norm"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types: must be of DownBlock2D, Attn"),
        (
            {"up_block_types": ["UpBlock2D", "SkipUpBlock2D"]},
            "up_block_types: must be of UpBlock2D, AttnUpBlock2D, was",
        ),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types: must have attention where down_block_"),
        ({"block_out_channels": [8]}, "down_block_types: must be as many as block_out_channels, 1, was 2"),
        ({"norm_num_groups": None}, "norm_num_groups: must be a number of groups, was None"),
        ({"attention_head_dim": 5}, "attention_head_dim: must divide the channels at attention, 16, was 5"),
        ({"attention_head_dim": 0}, "attention_head_dim: must be a number of channels or None, was 0"),
    ],
    ids=str,
)
def test_says_what_it_cannot_express(changes, fault):
    with pytest.raises(ValueError, match=re.escape(f"UNet2DModel:\n  {fault}")):
        nn.unet_from_diffusers({**TINY, **changes}, {})


def test_numbers_may_be_numpys():
    model = theirs(TINY)
    numbers = {"norm_num_groups": np.int64(TINY["norm_num_groups"]), "attention_head_dim": np.int32(8)}
    unet = nn.unet_from_diffusers({**TINY, **numbers}, model.state_dict())
    assert not [v for module in unet.modules() for v in vars(module).values() if isinstance(v, np.generic)]


def test_every_fault_is_named():
    with pytest.raises(ValueError, match=r"(?s)act_fn: .*upsample_type|upsample_type: .*act_fn"):
        nn.unet_from_diffusers({**TINY, "act_fn": "gelu", "upsample_type": "resnet"}, {})
    state_dict = theirs(TINY).state_dict()
    del state_dict["conv_in.bias"], state_dict["mid_block.attentions.0.to_k.weight"]
    state_dict["up_blocks.1.resnets.0.conv1.weight"] = torch.zeros(8, 1, 3, 3)
    state_dict["encoder.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="not those of the configuration") as caught:
        nn.unet_from_diffusers(TINY, state_dict)
    for fault in (
        "conv_in.bias: is missing",
        "mid_block.attentions.0.to_k.weight: is missing",
        "up_blocks.1.resnets.0.conv1.weight: must have the shape (8, 24, 3, 3), was (8, 1, 3, 3)",
        "encoder.weight: is not expected",
    ):
        assert f"\n  {fault}" in str(caught.value)
    assert str(caught.value).count("\n") == 4


def test_a_layer_by_two_names_is_refused():
    state_dict = theirs(TINY).state_dict()
    state_dict["mid_block.attentions.0.query.weight"] = torch.zeros(16, 16)
    fault = "mid_block.attentions.0.query.weight: is there as mid_block.attentions.0.to_q.weight too"
    with pytest.raises(ValueError, match=re.escape(fault)):
        nn.unet_from_diffusers(TINY, state_dict)


def test_says_what_it_takes():
    with pytest.raises(TypeError, match="state_dict must be left out where source is a model"):
        nn.unet_from_diffusers(theirs(TINY), {})
    with pytest.raises(TypeError, match="source must be a UNet2DModel or its configuration, got Linear"):
        nn.unet_from_diffusers(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="source must be a UNet2DModel or its configuration, got str"):
        nn.unet_from_diffusers("config.json", {})
    with pytest.raises(TypeError, match="state_dict must be a mapping of names to tensors, got NoneType"):
        nn.unet_from_diffusers(TINY)


def attention(**options):
    given = {"query_dim": 32, "heads": 4, "dim_head": 8, "norm_num_groups": 8, "residual_connection": True, **options}
    model = attention_processor.Attention(**given)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values / math.sqrt(32) if parameter.dim() > 1 else 0.3 * values)
    return model.eval()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"bias": True, "upcast_softmax": True, "_from_deprecated_attn_block": True}, nn.SpatialSelfAttention),
        ({"eps": 0.1, "heads": 1, "dim_head": 32, "bias": True}, nn.SpatialSelfAttention),
        ({"out_bias": False}, nn.SpatialSelfAttention),
        ({"cross_attention_dim": 12, "bias": True}, nn.SpatialCrossAttention),
        ({"cross_attention_dim": 32, "heads": 2, "dim_head": 16}, nn.SpatialCrossAttention),
    ],
    ids=str,
)
@torch.no_grad()
def test_an_attention_computes_the_same(options, kind):
    source = attention(**options)
    ours = nn.attention_from_diffusers(source)
    assert type(ours) is kind
    assert not ours.training
    x, context = torch.randn(2, 32, 5, 4), torch.randn(2, 7, options.get("cross_attention_dim", 1))
    given, theirs = ((x,), (x, None)) if kind is nn.SpatialSelfAttention else ((x, context), (x, context))
    want = source(*theirs)
    # float32 values of size 1, and sums of 32 of them in another order.
    torch.testing.assert_close(ours(*given), want, rtol=0, atol=1e-5)
    last = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in given]
    torch.testing.assert_close(ours(*last), want, rtol=0, atol=1e-5)
    kept = source.to_q.weight.clone()
    for parameter in ours.parameters():
        assert parameter.requires_grad
        parameter.zero_()
    assert torch.equal(source.to_q.weight, kept)
    half = nn.attention_from_diffusers(source.to(torch.bfloat16).train())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.training


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"norm_num_groups": None}, "norm_num_groups: must be a number of groups, was None"),
        ({"residual_connection": False}, "residual_connection: must be True, was False"),
        ({"rescale_output_factor": 2.0}, "rescale_output_factor: must be 1, was 2.0"),
        ({"scale_qk": False}, "scale_qk: must be True, was False"),
        ({"dropout": 0.1}, "dropout: must be 0, was 0.1"),
        ({"spatial_norm_dim": 4}, "spatial_norm_dim: must be None, for no SpatialNorm"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm: must be None, for no LayerNorm"),
        ({"qk_norm": "layer_norm"}, "qk_norm: must be None, for no LayerNorm"),
        ({"dim_head": 4}, "heads * dim_head: must be query_dim, 32, was 16"),
        ({"kv_heads": 2}, "kv_heads * dim_head: must be query_dim, 32, was 16"),
        ({"added_kv_proj_dim": 3}, "added_kv_proj_dim: must be None, was 3"),
        ({"pre_only": True}, "pre_only: must be False, was True"),
        (
            {"processor": attention_processor.XFormersAttnProcessor()},
            "processor: must be AttnProcessor or AttnProcessor2_0, was XFormersAttnProcessor",
        ),
    ],
)
def test_says_what_of_an_attention_it_cannot_express(options, fault):
    with pytest.raises(ValueError, match=re.escape(fault)) as caught:
        nn.attention_from_diffusers(attention(**options))
    assert str(caught.value).startswith("no module of gencore expresses this Attention:\n")


def test_every_fault_of_an_attention_is_named():
    with pytest.raises(ValueError, match="no module of gencore") as caught:
        nn.attention_from_diffusers(attention(residual_connection=False, norm_num_groups=None, dropout=0.5))
    assert str(caught.value).count("\n") == 3


@pytest.mark.parametrize("source", [torch.nn.Linear(3, 3), 3])
def test_an_attention_is_wanted(source):
    with pytest.raises(TypeError, match="source must be an Attention of diffusers, got "):
        nn.attention_from_diffusers(source)
