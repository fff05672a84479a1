"""diffusers' models and schedulers on our kernels compute what they did, and are given back as they were."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from gencore import ops
from gencore.integrations.diffusers import accelerate

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import (  # noqa: E402
    Attention,
    AttnProcessor,
    FusedAttnProcessor2_0,
)
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D  # noqa: E402

UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
CONDITIONED = {
    **UNET,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
AUTOENCODER = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
# float32 values of size 1 behind some 40 layers, of sums in another order: measured 2e-6.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def randomized(model):
    """The model with every parameter random, and values of size 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                values /= parameter[0].numel() ** 0.5
            else:
                values = 0.3 * values + (1 if "norm" in name and name.endswith("weight") else 0)
            parameter.copy_(values)
    return model.eval()


def normals(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet(**changes):
    return randomized(diffusers.UNet2DModel(**{**UNET, **changes}))


def of_unet(model, dtype=torch.float32, **options):
    x = normals(2, 3, 8, 8).to(dtype)
    if next(p for p in model.parameters() if p.dim() == 4).is_contiguous(memory_format=torch.channels_last):
        x = x.to(memory_format=torch.channels_last)
    return model(x, torch.tensor([3, 500]), **options).sample


def of_conditioned(model, dtype=torch.float32, **options):
    x, context = normals(2, 4, 8, 8).to(dtype), normals(2, 5, 24, seed=2).to(dtype)
    return model(x, torch.tensor([3, 500]), context, **options).sample


def of_autoencoder(model, dtype=torch.float32):
    encoded = model.encode(normals(2, 3, 16, 16).to(dtype)).latent_dist.parameters
    return torch.cat((encoded.flatten(), model.decode(normals(2, 4, 8, 8).to(dtype)).sample.flatten()))


MODELS = {
    "UNet2DModel": (unet, of_unet),
    "UNet2DModel, scale_shift": (
        lambda: unet(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8),
        of_unet,
    ),
    "UNet2DConditionModel": (lambda: randomized(diffusers.UNet2DConditionModel(**CONDITIONED)), of_conditioned),
    "AutoencoderKL": (lambda: randomized(diffusers.AutoencoderKL(**AUTOENCODER)), of_autoencoder),
}
each_model = pytest.mark.parametrize(("make", "run"), MODELS.values(), ids=list(MODELS))


def everything(model):
    """What a model holds besides its values."""
    return {
        name: (type(module), sorted(vars(module)), vars(module).get("processor"), list(module.children()))
        for name, module in model.named_modules()
    }


@each_model
@torch.no_grad()
def test_outputs_are_equal(make, run):
    model = make()
    want = run(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with accelerate(model) as acceleration:
        got = run(model)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        assert acceleration.explain().replaced
        assert acceleration.explain().kept == ()
    assert want.std() > 0.3
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, **TOLERANCE)


@each_model
@torch.no_grad()
def test_undo_leaves_nothing_behind(make, run):
    model = make()
    before, want = everything(model), run(model)
    acceleration = accelerate(model)
    assert everything(model) != before
    assert not any("forward" in vars(module) for module in model.modules())
    acceleration.undo()
    assert everything(model) == before
    assert torch.equal(run(model), want)
    acceleration.undo()
    assert everything(model) == before
    assert "undone" in repr(acceleration)


@each_model
def test_gradients_are_equal(make, run):
    model = make().train()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients():
        return torch.autograd.grad(run(model).square().mean(), parameters, allow_unused=True)

    want = gradients()
    with accelerate(model):
        got = gradients()
    for name, ours, theirs in zip(names, got, want, strict=True):
        if theirs is None:
            assert ours is None, name
            continue
        # A sum over all pixels of products of what was TOLERANCE away, relative to the largest of them.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(theirs.abs().max().item(), 1e-3), msg=name)


@each_model
@torch.no_grad()
def test_half_precision_and_autocast(make, run):
    model = make()
    want = run(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    theirs = (run(half, torch.bfloat16).float() - want).square().mean().sqrt()
    with accelerate(half):
        got = run(half, torch.bfloat16)
        assert got.dtype == torch.bfloat16
    # As far from float32 as diffusers' is, which rounds more often.
    assert (got.float() - want).square().mean().sqrt() < 1.1 * theirs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = (run(model).float() - want).square().mean().sqrt()
        with accelerate(model):
            ours = (run(model).float() - want).square().mean().sqrt()
    # Under autocast diffusers' norms are in float32, and so is what they give to the SiLU; ours round once, behind it.
    assert ours < 1.3 * theirs


@torch.no_grad()
def test_channels_last_is_kept():
    model = unet().to(memory_format=torch.channels_last)
    want = of_unet(model)
    formats = []
    with accelerate(model):
        hooks = [
            module.register_forward_hook(
                lambda *of: formats.append(of[2].is_contiguous(memory_format=torch.channels_last))
            )
            for module in model.modules()
            if isinstance(module, (ResnetBlock2D, Attention))
        ]
        got = of_unet(model)
    for hook in hooks:
        hook.remove()
    assert len(formats) > 8
    assert all(formats)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_compiles_as_one_graph():
    model = unet(down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(16,))
    want = of_unet(model)
    acceleration = accelerate(model)
    torch._dynamo.reset()
    # What the compiler makes of the graph is not ours: inductor takes a minute.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = of_unet(compiled)
    torch.testing.assert_close(got, want, **TOLERANCE)
    got.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    exported = torch.export.export(model, (torch.randn(1, 3, 8, 8), torch.tensor(3)))
    assert any("gencore" in str(node.target) for node in exported.graph.nodes)
    # What was compiled sees that it was undone.
    acceleration.undo()
    torch.testing.assert_close(of_unet(compiled), want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_copy_computes_with_its_own_weights():
    model = unet()
    with accelerate(model):
        other = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
    for parameter in other.parameters():
        parameter.zero_()
    assert not of_unet(other).any()
    assert of_unet(model).any()
    torch.testing.assert_close(of_unet(loaded), of_unet(model), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_is_undone_by_itself(copied):
    model = unet()
    want = of_unet(model)
    acceleration = accelerate(model)
    other, its_own = copied((model, acceleration))
    alone = copied(model)
    acceleration.undo()
    assert torch.equal(of_unet(model), want)
    for copy_of_it, undo in ((other, its_own.undo), (alone, lambda: accelerate(alone).undo())):
        fast = of_unet(copy_of_it)
        torch.testing.assert_close(fast, want, **TOLERANCE)
        assert not torch.equal(fast, want)
        undo()
        assert torch.equal(of_unet(copy_of_it), want)


def test_a_second_call_replaces_nothing():
    model = unet()
    first = accelerate(model)
    second = accelerate(model)
    assert second.explain().replaced == ()
    assert {part.what for part in second.explain().kept} == {"it runs on gencore's kernels already"}
    assert {part.name for part in second.explain().kept} == {part.name for part in first.explain().replaced}
    before = everything(model)
    second.undo()
    assert everything(model) == before


def test_what_somebody_else_changed_since_stays():
    model = unet()
    acceleration = accelerate(model)
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    processor = AttnProcessor()
    attention.set_processor(processor)
    model.conv_norm_out = norm = torch.nn.Identity()
    acceleration.undo()
    assert attention.processor is processor
    assert model.conv_norm_out is norm


def test_it_is_undone_where_it_fails():
    model = unet()
    before = everything(model)
    with pytest.raises(RuntimeError, match="boom"), accelerate(model):
        raise RuntimeError("boom")
    assert everything(model) == before


def test_explain_lists_what_was_replaced():
    with accelerate(unet()) as acceleration:
        explanation = acceleration.explain()
        text = str(explanation)
    by_type = {kind: sum(part.type == kind for part in explanation.replaced) for kind in ("ResnetBlock2D", "Attention")}
    assert by_type == {"ResnetBlock2D": 8, "Attention": 4}
    assert ("mid_block.attentions.0", "Attention", "attention on views of the projections") in explanation.replaced
    assert ("conv_norm_out", "GroupNorm", "group_norm") in explanation.replaced
    for line in (
        "replaced: 17",
        "  8 ResnetBlock2D: group_norm with SiLU, twice, the embedding added",
        "    down_blocks.0.resnets.0, down_blocks.1.resnets.0, ",
        "  5 GroupNorm: group_norm",
        "left as it was: nothing",
    ):
        assert line in text
    assert repr(acceleration).startswith("<Acceleration: 17 replaced, 0 left as they were")


def block(**options):
    return torch.nn.Sequential(ResnetBlock2D(in_channels=8, temb_channels=None, groups=4, **options))


def attention(**options):
    given = {"query_dim": 16, "heads": 2, "dim_head": 8, "norm_num_groups": 4, "residual_connection": True, **options}
    return torch.nn.Sequential(Attention(**given))


def hooked():
    made = block()
    made[0].norm2.register_forward_hook(lambda *_: None)
    return made


def with_own_forward():
    made = block()
    former = made[0].forward
    made[0].forward = lambda *args, **kwargs: former(*args, **kwargs)
    return made


class MyNorm(torch.nn.GroupNorm):
    pass


class MyBlock(ResnetBlock2D):
    pass


class MyAttention(Attention):
    pass


@pytest.mark.parametrize(
    ("model", "name", "reason", "others"),
    [
        (lambda: block(up=True), "0", "it upsamples between its norm and its convolution", 2),
        (lambda: block(down=True), "0", "it downsamples between its norm and its convolution", 2),
        (lambda: block(non_linearity="gelu"), "0", "its activation is GELU, not SiLU", 2),
        (lambda: block(time_embedding_norm="scale_shift"), "0", "its time_embedding_norm is scale_shift", 2),
        (
            lambda: torch.nn.Sequential(
                ResnetBlockCondNorm2D(in_channels=8, time_embedding_norm="ada_group", groups=4, eps=1e-5)
            ),
            "0",
            "its norms take the embedding in another way",
            0,
        ),
        (hooked, "0", "its norm2 has hooks", 2),
        (with_own_forward, "0", "it has a forward of its own", 2),
        (lambda: torch.nn.Sequential(MyNorm(2, 4)), "0", "it is a MyNorm, which may compute something else", 0),
        (lambda: torch.nn.Sequential(MyBlock(in_channels=8, groups=4)), "0", "it is a MyBlock, which may", 2),
        (lambda: torch.nn.Sequential(MyAttention(8)), "0", "it is a MyAttention, which may compute something else", 0),
        (lambda: attention(qk_norm="layer_norm"), "0", "it has a norm_q, LayerNorm", 1),
        (lambda: attention(kv_heads=1), "0", "its heads share keys: q has 16 channels, k 8", 1),
        (lambda: attention(query_dim=32, spatial_norm_dim=8), "0", "it has a spatial_norm, SpatialNorm", 2),
        (lambda: attention(processor=FusedAttnProcessor2_0()), "0", "its processor is FusedAttnProcessor2_0", 1),
        (lambda: attention(processor=AttnProcessor()), "0", "its processor is AttnProcessor, which may compute", 1),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), "Sequential", "it has no GroupNorm, ResnetBlock2D or", 0),
    ],
)
def test_explain_says_why_a_part_was_left(model, name, reason, others):
    made = model()
    explanation = accelerate(made).explain()
    kept = {part.name: part.what for part in explanation.kept}
    assert list(kept) == [name]
    assert reason in kept[name]
    assert reason in str(explanation)
    assert len(explanation.replaced) == others


@torch.no_grad()
def test_a_mask_is_the_former_processors():
    model = randomized(diffusers.UNet2DConditionModel(**CONDITIONED))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    want, without = of_conditioned(model, encoder_attention_mask=mask), of_conditioned(model)
    with accelerate(model), mock.patch.object(ops, "attention", wraps=ops.attention) as attend:
        got = of_conditioned(model, encoder_attention_mask=mask)
    assert any(call.kwargs["mask"] is not None for call in attend.call_args_list)
    assert not torch.allclose(want, without, atol=1e-3)
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 12), (4, 1, 12), (2, 12, 12), (4, 12, 12), (2, 1, 5)], ids=str)
@torch.no_grad()
def test_masks_of_any_shape(shape, dtype):
    """For each sample, or each of its heads too, and for each query. One of fewer tokens goes to diffusers."""
    module = randomized(attention(heads=2, dim_head=8, query_dim=16)[0])
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = drawn if dtype == torch.bool else (1 - drawn.float()) * -10000
    wrapped = mock.patch.object(ops, "attention", wraps=ops.attention)
    if shape[-1] == 5:
        for acceleration in (nullcontext(), accelerate(module)):
            with acceleration, wrapped as attend, pytest.raises(RuntimeError):
                module(x, attention_mask=mask)
            attend.assert_not_called()
        return
    want = module(x, attention_mask=mask)
    with accelerate(module), wrapped as attend:
        torch.testing.assert_close(module(x, attention_mask=mask), want, **TOLERANCE)
    attend.assert_called_once()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": None, "residual_connection": False, "bias": True},
        {"rescale_output_factor": 1.5, "upcast_softmax": True},
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        {"cross_attention_dim": 12, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
        {"heads": 3, "dim_head": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 16, 4, 3), (2, 12, 16)])
@torch.no_grad()
def test_every_setting_of_attention(options, shape):
    model = randomized(attention(**options))[0]
    x = normals(*shape)
    context = normals(2, 5, 12, seed=2) if "cross_attention_dim" in options else None
    want = model(x, encoder_hidden_states=context)
    with accelerate(model) as acceleration:
        assert any(part.type == "Attention" for part in acceleration.explain().replaced)
        torch.testing.assert_close(model(x, encoder_hidden_states=context), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_settings_of_a_block():
    for options in ({"output_scale_factor": 2.0}, {"skip_time_act": True}, {"groups_out": 8, "out_channels": 16}):
        model = randomized(ResnetBlock2D(in_channels=8, temb_channels=6, groups=4, **options))
        x, embedding = normals(2, 8, 5, 4), normals(2, 6, seed=2)
        want, of_one = model(x, embedding), model(x, embedding[:1])
        with accelerate(model):
            torch.testing.assert_close(model(x, embedding), want, rtol=1e-5, atol=1e-5)
            # One embedding for all samples is diffusers' own to spread.
            torch.testing.assert_close(model(x, embedding[:1]), of_one, rtol=1e-5, atol=1e-5)


def test_a_pipeline_is_its_parts():
    pipeline = diffusers.DDPMPipeline(unet(sample_size=8), diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def sampled():
        return torch.from_numpy(
            pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
        )

    want = sampled()
    with accelerate(pipeline) as acceleration:
        got = sampled()
        names = {part.name for part in acceleration.explain().replaced}
    assert {"scheduler", "unet.conv_norm_out", "unet.mid_block.attentions.0"} <= names
    # Images in [0, 1], of four steps that multiply a difference by up to 160.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)
    assert torch.equal(sampled(), want)


def test_it_may_be_given_a_layer_alone():
    norm = torch.nn.GroupNorm(2, 4)
    with accelerate(norm) as acceleration:
        assert acceleration.explain().replaced == (("GroupNorm", "GroupNorm", "group_norm"),)
        assert type(norm) is not torch.nn.GroupNorm
    assert type(norm) is torch.nn.GroupNorm


def test_says_what_it_takes():
    message = "target must be a module, a scheduler or a pipeline of diffusers, got int"
    with pytest.raises(TypeError, match=re.escape(message)):
        accelerate(3)


def test_diffusers_is_not_needed_to_import():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import gencore.integrations.diffusers as ours\n"
        "try:\n    ours.accelerate(None)\nexcept ImportError:\n    sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
