"""What others do to a model of diffusers after it was accelerated has the effect that it has without."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from gencore.integrations.diffusers import accelerate

diffusers = pytest.importorskip("diffusers")

from diffusers import hooks  # noqa: E402
from diffusers.loaders.ip_adapter import IPAdapterMixin  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from integrations.diffusers_parts import (  # noqa: E402
    CONTEXT,
    IMAGES,
    a_block,
    an_attention,
    assert_close,
    normals,
    run,
    unet,
)


def doubled(module, args, output):
    return 2 * output


def one_channel_scaled(module, args):
    """A norm takes back what is done to a whole group."""
    scale = torch.ones(args[0].shape[1], 1, 1)
    scale[0] = 5
    return (args[0] * scale,)


def forwarded(module):
    former = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: 2 * former(*args, **kwargs), module)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class LowRank(nn.Linear):
    """As adapters replace a projection."""

    def forward(self, x):
        return super().forward(x) + x[..., :1]


def replaced(parent, name, made):
    setattr(parent, name, made(getattr(parent, name)))


def with_low_rank(model):
    attention = an_attention(model)
    for name in ("to_q", "to_v"):
        getattr(attention, name).__class__ = LowRank


def ip_adapter(model):
    generator = torch.Generator().manual_seed(4)
    weights = {}
    names = [name for name in model.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(names):
        width = model.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * number + 1}.{part}.weight"] = torch.randn(width, CONTEXT, generator=generator)
    projection = {
        "proj.weight": torch.randn(4 * CONTEXT, IMAGES, generator=generator),
        "proj.bias": torch.zeros(4 * CONTEXT),
        "norm.weight": torch.ones(CONTEXT),
        "norm.bias": torch.zeros(CONTEXT),
    }
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)


def without_ip_adapter(model):
    class Pipeline(IPAdapterMixin):
        safety_checker = None

    pipeline = Pipeline()
    pipeline.unet = model
    pipeline.unload_ip_adapter()


def layer_skip(model, **what):
    config = hooks.LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks", **what)
    hooks.apply_layer_skip(model, config)


def offloaded(model, **options):
    device = torch.device("cpu")
    model.enable_group_offload(onload_device=device, offload_device=device, **options)


def offloaded_in_turn(model):
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def cast_layerwise(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def fused_and_unfused(model):
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()


# What is done to a model, and whether its output is another then.
CHANGES = {
    "hook on a norm": (lambda m: a_block(m).norm1.register_forward_hook(doubled), True),
    "hook before a norm": (lambda m: a_block(m).norm2.register_forward_pre_hook(one_channel_scaled), True),
    "hook on an activation": (lambda m: a_block(m).nonlinearity.register_forward_hook(doubled), True),
    "hook on the last norm": (lambda m: m.conv_norm_out.register_forward_hook(doubled), True),
    "hook before the last activation": (
        lambda m: m.conv_act.register_forward_pre_hook(lambda _, x: (x[0] + 1.0,)),
        True,
    ),
    "hook on a projection": (lambda m: an_attention(m).to_q.register_forward_hook(doubled), True),
    "forward of a norm": (lambda m: forwarded(a_block(m).norm2), True),
    "forward of a block": (lambda m: forwarded(a_block(m)), True),
    "forward of an attention": (lambda m: forwarded(an_attention(m)), True),
    "norm in a wrapper": (lambda m: replaced(a_block(m), "norm1", Wrapper), True),
    "another norm": (lambda m: replaced(a_block(m), "norm1", lambda _: nn.GroupNorm(1, 16)), True),
    "another activation": (lambda m: replaced(a_block(m), "nonlinearity", lambda _: nn.GELU()), True),
    "no dropout": (lambda m: replaced(a_block(m), "dropout", lambda _: nn.Identity()), False),
    "attention in a wrapper": (
        lambda m: replaced(m.mid_block.attentions[0].transformer_blocks[0], "attn1", Wrapper),
        True,
    ),
    "parametrized norm": (lambda m: parametrize.register_parametrization(a_block(m).norm1, "weight", Twice()), True),
    "parametrized last norm": (
        lambda m: parametrize.register_parametrization(m.conv_norm_out, "weight", Twice()),
        True,
    ),
    "parametrized block": (
        lambda m: parametrize.register_parametrization(a_block(m).conv1, "weight", Twice()),
        True,
    ),
    "pruned norm": (lambda m: prune.random_unstructured(a_block(m).norm2, "weight", amount=0.5), True),
    "pruned last norm": (lambda m: prune.l1_unstructured(m.conv_norm_out, "weight", amount=3), True),
    "low-rank projections": (with_low_rank, True),
    "IP adapter": (ip_adapter, False),
    "IP adapter, come and gone": (lambda m: (ip_adapter(m), without_ip_adapter(m)), False),
    "skipped attention": (lambda m: layer_skip(m, skip_attention=True, skip_ff=False), True),
    "skipped scores": (lambda m: layer_skip(m, skip_attention=False, skip_attention_scores=True, skip_ff=False), True),
    "skipped block": (lambda m: layer_skip(m), True),
    "FreeU": (lambda m: m.enable_freeu(0.9, 0.2, 1.2, 1.4), True),
    "sliced attention": (lambda m: m.set_attention_slice(1), False),
    "default processors": (lambda m: m.set_default_attn_processor(), False),
    "fused projections": (lambda m: m.fuse_qkv_projections(), False),
    "fused and unfused": (fused_and_unfused, False),
    "layerwise casting": (cast_layerwise, True),
    "sequential offload": (offloaded_in_turn, False),
    "leaves offloaded": (lambda m: offloaded(m, offload_type="leaf_level"), False),
    "blocks offloaded": (lambda m: offloaded(m, offload_type="block_level", num_blocks_per_group=1), False),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("change", "has_effect"), CHANGES.values(), ids=list(CHANGES))
@torch.no_grad()
def test_a_change_has_its_effect(change, has_effect, order):
    """Before and after, and when the acceleration is undone: then to the bit."""
    theirs, ours = unet(), unet()
    unchanged = run(theirs)
    for model in (theirs, ours):
        torch.manual_seed(5)
        if model is ours and order == "after":
            acceleration = accelerate(model)
        change(model)
        if model is ours and order == "before":
            acceleration = accelerate(model)
    # None is offered to what is no IP adapter.
    images = [normals(2, 1, IMAGES, seed=3)] if theirs.config.encoder_hid_dim_type == "ip_image_proj" else None
    want = run(theirs, images)
    if has_effect:
        assert (want - unchanged).abs().max() > 1e-3 * want.abs().max()
    assert_close(run(ours, images), want)
    assert acceleration.explain().replaced
    acceleration.undo()
    assert torch.equal(run(ours, images), want)


@torch.no_grad()
def test_offloading_to_disk(tmp_path):
    theirs, ours = unet(), unet()
    acceleration = accelerate(ours)
    for number, model in enumerate((theirs, ours)):
        for kind in ("leaf_level",):
            offloaded(model, offload_type=kind, offload_to_disk_path=str(tmp_path / str(number)))
    want = run(theirs)
    assert_close(run(ours), want)
    acceleration.undo()
    assert torch.equal(run(ours), want)


@torch.no_grad()
def test_hooks_see_what_diffusers_gives_them():
    """Every module's output: values, and how they lie in memory."""

    def seen(model, hooked):
        outputs = []
        for name, module in model.named_modules():
            if hooked(name, module):
                module.register_forward_hook(lambda *of, name=name: outputs.append((name, of[2])))
        run(model)
        return [(name, output) for name, output in outputs if isinstance(output, torch.Tensor)]

    for hooked in (
        lambda name, module: True,
        lambda name, module: not list(module.children()),
        lambda name, module: isinstance(module, (ResnetBlock2D, Attention)),
    ):
        theirs, ours = unet(), unet()
        accelerate(ours)
        want, got = seen(theirs, hooked), seen(ours, hooked)
        assert [name for name, _ in got] == [name for name, _ in want]
        for (name, of_ours), (_, of_theirs) in zip(got, want, strict=True):
            assert of_ours.shape == of_theirs.shape, name
            assert of_ours.stride() == of_theirs.stride(), name
            assert_close(of_ours, of_theirs)


def test_gradients_pass_hooks():
    def gradients(model):
        norm = a_block(model).norm2
        norm.register_full_backward_hook(lambda module, of_input, of_output: (3 * of_input[0],))
        run(model).square().mean().backward()
        return [a_block(model).conv1.weight.grad, model.conv_in.weight.grad]

    ours = unet()
    accelerate(ours)
    for got, want in zip(gradients(ours), gradients(unet()), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
def test_dropout_draws_what_it_drew(memory_format, scale_shift):
    """And everything lies in memory as it did, which is the order of the draws."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        dropout=0.3,
        resnet_time_scale_shift=scale_shift,
        attn_norm_num_groups=4,
    )
    model = model.to(memory_format=memory_format).train()
    x = normals(2, 3, 8, 8).to(memory_format=memory_format)
    strides = []
    for module in model.modules():
        if isinstance(module, (ResnetBlock2D, Attention)):
            module.register_forward_hook(lambda *of: strides.append(of[2].stride()))

    def trained():
        strides.clear()
        torch.manual_seed(1)
        return model(x, 5).sample, list(strides)

    want, their_strides = trained()
    with accelerate(model) as acceleration:
        assert {part.type for part in acceleration.explain().replaced} >= {"ResnetBlock2D", "Attention"}
        got, our_strides = trained()
    assert our_strides == their_strides
    assert_close(got, want)
    assert not torch.equal(got, want)


def test_processors_and_names_stay():
    """Libraries find by the names of classes what they adapt and shard, and by processors what they may do."""
    model = unet()
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    processors, printed = model.attn_processors, repr(model)
    accelerate(model)
    assert {name: type(module).__name__ for name, module in model.named_modules()} == names
    assert model.attn_processors == processors
    assert repr(model) == printed


@torch.no_grad()
def test_default_processors_are_diffusers_own():
    attention = an_attention(unet())
    x = normals(2, 7, 32)
    attention.set_processor(AttnProcessor())
    want = attention(x)
    attention.set_processor(AttnProcessor2_0())
    acceleration = accelerate(attention)
    assert not torch.equal(attention(x), want)
    attention.set_processor(AttnProcessor())
    assert torch.equal(attention(x), want)
    assert acceleration.explain().kept[0].what == "its processor is AttnProcessor, which may compute something else"
    # And back again: what runs is decided at every call.
    attention.set_processor(AttnProcessor2_0())
    assert acceleration.explain().kept == ()


def test_models_of_other_kinds_say_why_nothing_was_replaced():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=[2, 2, 4],
    )
    explanation = accelerate(model).explain()
    assert explanation.replaced == ()
    assert {part.type for part in explanation.kept} == {"FluxAttention"}
    pipeline = diffusers.DDPMPipeline(nn.Linear(2, 2), diffusers.PNDMScheduler())
    assert [part.name for part in accelerate(pipeline).explain().kept] == ["unet", "scheduler"]


def test_a_graph_of_torch_fx_is_pytorchs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8))
    x = normals(1, 3, 9, 9)
    want = torch.fx.symbolic_trace(model)(x)
    accelerate(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), want)
    with torch.device("cpu"):
        assert torch.equal(torch.fx.symbolic_trace(model)(x), want)


def test_fully_sharded(tmp_path):
    """FSDP2 gives a module another class, and its parameters when its hooks run."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch.distributed is not built")
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for kinds in ((ResnetBlock2D, Attention), (nn.GroupNorm,), ()):
            theirs, ours = unet(), unet()
            acceleration = accelerate(ours)
            for model in (theirs, ours):
                for module in list(model.modules()):
                    if isinstance(module, kinds):
                        fully_shard(module, mesh=mesh)
                fully_shard(model, mesh=mesh)
            with torch.no_grad():
                want = run(theirs)
                assert_close(run(ours), want)
                names = {name: type(module).__name__ for name, module in theirs.named_modules()}
                assert {name: type(module).__name__ for name, module in ours.named_modules()} == names
                acceleration.undo()
                assert torch.equal(run(ours), want)
    finally:
        distributed.destroy_process_group()


def test_numpy_integers_are_numbers_of_groups():
    numpy = pytest.importorskip("numpy")
    model = nn.Sequential(nn.GroupNorm(numpy.gcd(32, 48), 48))
    x = normals(2, 48, 4)
    want = model(x)
    with accelerate(model):
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
