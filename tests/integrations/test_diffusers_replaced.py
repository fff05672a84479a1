"""Functions that others watch or replace run, and explain() and undo() follow what happened to a model."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gencore.integrations import diffusers as integration
from gencore.integrations.diffusers import accelerate

diffusers = pytest.importorskip("diffusers")

from diffusers import hooks  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor2_0  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from integrations.diffusers_parts import a_block, an_attention, assert_close, normals, run, unet  # noqa: E402


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


def test_explain_follows_what_others_change():
    model = unet()
    acceleration = accelerate(model)
    assert acceleration.explain().kept == ()
    blocks = sum(isinstance(module, ResnetBlock2D) for module in model.modules())
    handle = a_block(model).norm1.register_forward_hook(lambda module, args, output: 2 * output)
    explanation = acceleration.explain()
    assert explanation.kept == (("down_blocks.0.resnets.0", "ResnetBlock2D", "its norm1 has hooks"),)
    assert ("down_blocks.0.resnets.0.norm1", "GroupNorm", "group_norm") in explanation.replaced
    assert sum(part.type == "ResnetBlock2D" for part in explanation.replaced) == blocks - 1
    handle.remove()
    with every_norm_hooked():
        assert {part.what for part in acceleration.explain().kept} == {"hooks of every module see its norms"}
    assert acceleration.explain().kept == ()


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
