"""What others do to a model of diffusers after it was accelerated has the effect that it has without."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from gencore.integrations import diffusers as integration
from gencore.integrations.diffusers import accelerate

diffusers = pytest.importorskip("diffusers")

from diffusers import hooks  # noqa: E402
from diffusers.loaders.ip_adapter import IPAdapterMixin  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402

CONTEXT, IMAGES = 24, 12
# As in test_diffusers.py, in units of the largest value.
TOLERANCE = 1e-4


def normals(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def original():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=CONTEXT,
    )
    return model.eval()


def unet():
    return copy.deepcopy(original())


def run(model, images=None):
    x, context = normals(2, 4, 8, 8), normals(2, 5, CONTEXT, seed=2)
    return model(x, torch.tensor([3, 500]), context, added_cond_kwargs={"image_embeds": images}).sample


def a_block(model):
    return model.down_blocks[0].resnets[0]


def an_attention(model):
    return model.mid_block.attentions[0].transformer_blocks[0].attn1


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * max(1, want.abs().max().item()))


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


class Watcher(TorchFunctionMode):
    """Lets one of PyTorch's functions give twice what it gave."""

    def __init__(self, watched):
        super().__init__()
        self.watched = watched

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        return 2 * output if function is self.watched else output


@contextlib.contextmanager
def every_norm_hooked():
    def hook(module, args, output):
        return 2 * output if isinstance(module, nn.GroupNorm) else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def patched(owner, name):
    former = getattr(owner, name)
    try:
        setattr(owner, name, lambda *args, **kwargs: 2 * former(*args, **kwargs))
        yield
    finally:
        setattr(owner, name, former)


@contextlib.contextmanager
def calls_of_norms_patched():
    former = nn.Module.__call__

    def call(module, *args, **kwargs):
        output = former(module, *args, **kwargs)
        return 2 * output if isinstance(module, nn.GroupNorm) else output

    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = former


PATCHES = [
    *(lambda name=name: patched(F, name) for name in ("scaled_dot_product_attention", "group_norm", "silu")),
    *(lambda kind=kind: patched(kind, "forward") for kind in (nn.GroupNorm, nn.SiLU, Attention, ResnetBlock2D)),
    lambda: patched(AttnProcessor2_0, "__call__"),
    lambda: patched(torch, "group_norm"),
    calls_of_norms_patched,
]


@pytest.mark.parametrize(
    "watched",
    [lambda: Watcher(F.scaled_dot_product_attention), lambda: Watcher(F.group_norm), every_norm_hooked, *PATCHES],
)
@torch.no_grad()
def test_whoever_watches_or_replaces_functions_sees_diffusers_own(watched):
    theirs, ours = unet(), unet()
    accelerate(ours)
    unchanged = run(theirs)
    with watched():
        want, got = run(theirs), run(ours)
    assert (want - unchanged).abs().max() > 1e-3 * want.abs().max()
    assert_close(got, want)


@contextlib.contextmanager
def integration_imported_anew():
    """As it is by the first call of accelerate in a process."""
    names = ("modules", "schedulers")
    former = {name: importlib.import_module(f"{integration.__name__}.{name}") for name in names}

    def forget():
        for name in names:
            sys.modules.pop(f"{integration.__name__}.{name}", None)
            vars(integration).pop(name, None)

    forget()
    try:
        yield
    finally:
        forget()
        for name, module in former.items():
            sys.modules[module.__name__] = module
            setattr(integration, name, module)


@pytest.mark.parametrize("patch", PATCHES)
@torch.no_grad()
def test_what_was_replaced_before_anything_is_accelerated_stays_replaced(patch):
    theirs, ours = unet(), unet()
    unchanged = run(theirs)
    with patch(), integration_imported_anew():
        acceleration = accelerate(ours)
        want, got = run(theirs), run(ours)
        assert (want - unchanged).abs().max() > 1e-3 * want.abs().max()
        assert_close(got, want)
        assert any("replaced" in part.what or "hooks" in part.what for part in acceleration.explain().kept)


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
def test_methods_of_schedulers_that_were_replaced_run(kind):
    x, output = normals(2, 3, 4, 4), normals(2, 3, 4, 4, seed=2)

    def step(scheduler):
        scheduler.set_timesteps(10)
        options = {"eta": 1.0} if kind is diffusers.DDIMScheduler else {}
        return scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(0), **options)[0]

    scheduler = kind()
    acceleration = accelerate(scheduler)
    unchanged = step(scheduler)
    scheduler._get_variance = lambda *args, **kwargs: torch.tensor(0.25)
    theirs = kind()
    theirs._get_variance = scheduler._get_variance
    assert not torch.equal(step(theirs), unchanged)
    assert torch.equal(step(scheduler), step(theirs))
    assert [part.what for part in acceleration.explain().kept] == ["its _get_variance was replaced"]
    del scheduler._get_variance
    assert torch.equal(step(scheduler), unchanged)

    former = kind.step
    kind.step = lambda *args, **kwargs: (3 * former(*args, **kwargs)[0],)
    try:
        want = step(kind())
        assert torch.equal(step(scheduler), want)
        assert [part.what for part in acceleration.explain().kept] == ["its step was replaced"]
        with integration_imported_anew():
            late = kind()
            assert accelerate(late).explain().replaced == ()
            assert torch.equal(step(late), want)
    finally:
        kind.step = former


class Counted(hooks.ModelHook):
    """A hook of diffusers, which gives its module another forward."""


def hooked_by_diffusers(module):
    registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(Counted(), "counted")
    return lambda: registry.remove_hook("counted", recurse=False)


def hooked_by_accelerate(module):
    library = pytest.importorskip("accelerate.hooks")
    library.add_hook_to_module(module, library.ModelHook())
    return lambda: library.remove_hook_from_module(module)


@pytest.mark.parametrize("hooked", [hooked_by_diffusers, hooked_by_accelerate])
@torch.no_grad()
def test_removed_hooks_leave_nothing(hooked):
    """Though they leave the class's method in the module, bound: what it runs on is what its class says."""
    model = unet()
    want = run(model)
    kinds = (nn.GroupNorm, nn.SiLU, ResnetBlock2D, Attention)

    def hook_all():
        return [hooked(module) for module in list(model.modules()) if isinstance(module, kinds)]

    def remove(removers):
        for remover in removers:
            remover()

    remove(hook_all())
    for _ in range(2):
        acceleration = accelerate(model)
        assert acceleration.explain().kept == ()
        got = run(model)
        assert not torch.equal(got, want)
        assert_close(got, want)
        removers = hook_all()
        assert acceleration.explain().replaced == ()
        assert_close(run(model), want)
        remove(removers)
        assert acceleration.explain().kept == ()
        assert torch.equal(run(model), got)
        acceleration.undo()
        assert not any("forward" in vars(module) for module in model.modules() if type(module) is nn.GroupNorm)
        assert torch.equal(run(model), want)


def test_explain_and_undo_where_a_forward_was_replaced_or_parts_were_lost():
    model = unet()
    acceleration = accelerate(model)
    block, attention, norm = a_block(model), an_attention(model), model.conv_norm_out
    norm.forward = lambda x: x
    block.forward = lambda x, temb: x
    del block.nonlinearity
    del attention.spatial_norm
    kept = {part.name: part.what for part in acceleration.explain().kept}
    assert kept.pop("conv_norm_out") == kept.pop("down_blocks.0.resnets.0") == "it has a forward of its own"
    ((name, reason),) = kept.items()
    assert name.endswith("attn1")
    assert "spatial_norm" in reason
    acceleration.undo()
    assert (type(block), type(attention), type(norm)) == (ResnetBlock2D, Attention, nn.GroupNorm)


def test_undo_where_explain_fails(monkeypatch):
    model = unet()
    acceleration = accelerate(model)
    monkeypatch.setattr(acceleration, "explain", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        acceleration.undo()
    assert {type(module) for module in model.modules() if isinstance(module, nn.GroupNorm)} == {nn.GroupNorm}


def test_derivatives_in_forward_mode():
    """Ours have none: a module under one is diffusers' own."""
    model, x, direction = nn.Sequential(nn.GroupNorm(4, 16)), normals(2, 16, 4, 4), normals(2, 16, 4, 4, seed=2)
    block = a_block(unet())
    temb = normals(2, block.time_emb_proj.in_features)
    for module, function in ((model, model), (block, lambda x: block(x, temb))):
        want = torch.func.jvp(function, (x,), (direction,))
        with accelerate(module):
            got = torch.func.jvp(function, (x,), (direction,))
        for of_ours, of_theirs in zip(got, want, strict=True):
            assert torch.equal(of_ours, of_theirs)


def test_a_device_without_kernels_runs_diffusers_own(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gencore.integrations.diffusers import modules

    with FakeTensorMode():
        x = torch.empty(2, 16, 4, 4, device="cuda")
        for is_served in (True, False):
            monkeypatch.setattr(modules.ops, "is_served", lambda device, answer=is_served: answer)
            assert modules._is_served(x) is is_served


@torch.no_grad()
def test_hooks_of_projections_see_an_image_s_tokens_as_they_were():
    attention = Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True)
    x = normals(2, 16, 4, 4)
    strides = []
    attention.to_k.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
    want = attention(x)
    with accelerate(attention):
        assert_close(attention(x), want)
    assert strides[0] == strides[1]


@torch.no_grad()
def test_a_default_device_watches_nothing():
    model = unet()
    accelerate(model)
    want = run(model)
    with torch.device("cpu"):
        assert torch.equal(run(model), want)


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


def test_explain_follows_what_others_change():
    model = unet()
    acceleration = accelerate(model)
    assert acceleration.explain().kept == ()
    blocks = sum(isinstance(module, ResnetBlock2D) for module in model.modules())
    handle = a_block(model).norm1.register_forward_hook(doubled)
    explanation = acceleration.explain()
    assert explanation.kept == (("down_blocks.0.resnets.0", "ResnetBlock2D", "its norm1 has hooks"),)
    assert ("down_blocks.0.resnets.0.norm1", "GroupNorm", "group_norm") in explanation.replaced
    assert sum(part.type == "ResnetBlock2D" for part in explanation.replaced) == blocks - 1
    handle.remove()
    with every_norm_hooked():
        assert {part.what for part in acceleration.explain().kept} == {"hooks of every module see its norms"}
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


@pytest.mark.parametrize("context", [contextlib.nullcontext, lambda: torch.device("cpu")])
@torch.no_grad()
def test_what_watches_functions_is_seen_by_the_compiler(context):
    model = unet()
    attention, block = an_attention(model), model.conv_norm_out
    accelerate(model)
    for module, x, watched in (
        (attention, normals(2, 7, 32), F.scaled_dot_product_attention),
        (block, normals(2, 16, 4, 4), F.group_norm),
    ):
        targets = []

        def backend(graph, inputs, targets=targets):
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        with context():
            assert_close(compiled(x), module(x))
            assert any("gencore" in target for target in targets)
            targets.clear()
            with Watcher(watched):
                compiled(x)
            assert not any("gencore" in target for target in targets)


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
