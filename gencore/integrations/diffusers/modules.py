"""Modules of diffusers on our kernels.

A module changes its class, so that it keeps every attribute that it has. The new class has the name of the old one, by
which libraries find what they offload, shard or adapt. Whether a call takes our kernel is decided at that call: only
where nothing that diffusers would call on the way could tell the difference.
"""

from __future__ import annotations

import math
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models import attention_processor, resnet
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function

from gencore import nn as ours
from gencore import ops
from gencore._torch import function_modes, has_global_hook, is_differentiated_forward
from gencore.integrations.diffusers.originals import original
from gencore.integrations.diffusers.parts import ALREADY, Left, Part, Replacement

# What our kernels stand in for. Whoever puts something else in these places means it to run.
_GROUP_NORM, _GROUP_NORM_FORWARD = original(F, "group_norm"), original(nn.GroupNorm, "forward")
_GROUP_NORM_KERNEL = original(torch, "group_norm")
_SILU, _SILU_FORWARD = original(F, "silu"), original(nn.SiLU, "forward")
_ATTENTION, _PROCESS = original(F, "scaled_dot_product_attention"), original(AttnProcessor2_0, "__call__")
_ATTENTION_FORWARD = original(attention_processor.Attention, "forward")
_PREPARE = original(attention_processor.Attention, "prepare_attention_mask")
_BLOCK_FORWARD = original(resnet.ResnetBlock2D, "forward")
_CALL = original(nn.Module, "__call__", "Module._wrapped_call_impl")
_OWN_FORWARD = "has a forward of its own"
# Modes of PyTorch's own, which place tensors or trace, and leave the meaning of functions as it is.
_HARMLESS_MODES = ("torch.utils._device", "torch._export", "torch.export", "torch.fx")


class GroupNorm(nn.GroupNorm):
    """A ``torch.nn.GroupNorm`` whose class was changed."""

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, GroupNorm):
            # A hook may call this method, which it found here, when the class has been given back.
            return nn.GroupNorm.forward(self, input)
        if _why_norm_is_theirs() is None and _is_served(input):
            return _group_norm(self, input)
        return super().forward(input)


class ResnetBlock2D(resnet.ResnetBlock2D):
    """A ``ResnetBlock2D`` whose class was changed: both norms with their SiLU and the embedding are one kernel each."""

    def forward(self, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor
        if not isinstance(self, ResnetBlock2D):
            output = resnet.ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
            return output
        projection = self.time_emb_proj
        if (
            args
            or kwargs
            or not _is_served(input_tensor)
            or (temb is None) != (projection is None)
            or not (temb is None or (temb.dim() == 2 and temb.shape[0] == input_tensor.shape[0]))
            or _why_block_is_theirs(self) is not None
        ):
            output = super().forward(input_tensor, temb, *args, **kwargs)
            return output
        modulation: dict[str, Tensor] = {}
        hidden = self.conv1(_group_norm(self.norm1, input_tensor, activation="silu"))
        if temb is not None:
            embedded = projection(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                modulation["scale"], modulation["shift"] = embedded.chunk(2, dim=1)
            else:
                modulation["bias_in"] = embedded
        hidden = _group_norm(self.norm2, hidden, activation="silu", **modulation)
        if self.training and hidden.is_cuda and getattr(self.dropout, "p", False):
            # What PyTorch's norm returns there in any memory format, and the order in which dropout draws.
            hidden = hidden.contiguous()
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            if self.training:
                # As diffusers does, against a warning of DistributedDataParallel.
                input_tensor = input_tensor.contiguous()
            input_tensor = self.conv_shortcut(input_tensor)
        hidden = input_tensor + hidden
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


class Attention(attention_processor.Attention):
    """An ``Attention`` whose class was changed: what ``AttnProcessor2_0`` does, on views of the projections."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        output: Tensor
        if not isinstance(self, Attention):
            output = attention_processor.Attention.forward(
                self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
            return output
        if (
            not (attention_mask is None or _is_mask(self, attention_mask, hidden_states, encoder_hidden_states))
            # The embedding of the time step is for a spatial norm, which is not served.
            or any(name != "temb" for name in cross_attention_kwargs)
            or not _is_served(hidden_states)
            or hidden_states.dim() not in (3, 4)
            or not (encoder_hidden_states is None or _is_context(encoder_hidden_states, hidden_states))
            or _why_attention_is_theirs(self) is not None
            # Of an image, they are given tokens that lie in memory in another way.
            or (hidden_states.dim() == 4 and _are_projections_seen(self))
        ):
            output = super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
            return output
        tokens = hidden_states
        is_image = hidden_states.dim() == 4
        if self.group_norm is not None:
            # An image is normed as it is: in channels_last, its tokens would go through a copy.
            tokens = _group_norm(self.group_norm, tokens if is_image else tokens.transpose(1, 2))
            tokens = tokens if is_image else tokens.transpose(1, 2)
        if is_image:
            # A view of an image in channels_last; else a copy, which three projections read.
            tokens = tokens.flatten(2).transpose(1, 2).contiguous()
        q = self.to_q(tokens)
        context = tokens
        if encoder_hidden_states is not None:
            is_normed = self.norm_cross is not None
            context = self.norm_encoder_hidden_states(encoder_hidden_states) if is_normed else encoder_hidden_states
        q, k, v = (
            projected.reshape(*projected.shape[:2], self.heads, projected.shape[2] // self.heads).transpose(1, 2)
            for projected in (q, self.to_k(context), self.to_v(context))
        )
        # The result lies in memory as q does, so that the heads come back together without a copy.
        mask = None
        if attention_mask is not None:
            # A row of tokens for each sample, or sample and head, or one for each query too: what heads share is read
            # where it is.
            per_head = len(attention_mask) != len(k)
            mask = attention_mask.unflatten(0, (len(k), self.heads)) if per_head else attention_mask.unsqueeze(1)
        mixed = ops.attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)
        output = self.to_out[1](self.to_out[0](mixed))
        if is_image:
            output = output.transpose(1, 2).reshape(len(output), output.shape[2], *hidden_states.shape[2:])
        if self.residual_connection:
            # In this order: the memory format of a sum is that of its first term.
            output = output + hidden_states
        return output if self.rescale_output_factor == 1 else output / self.rescale_output_factor


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: GroupNorm,
    resnet.ResnetBlock2D: ResnetBlock2D,
    attention_processor.Attention: Attention,
}


def _group_norm(norm: Any, x: Tensor, **options: Any) -> Tensor:
    # PyTorch takes any integer for the number of groups, such as NumPy's.
    return ops.group_norm(x, int(norm.num_groups), norm.weight, norm.bias, norm.eps, **options)


def _is_served(x: Tensor) -> bool:
    """Whether x is on a device with kernels, and nobody but PyTorch watches what its functions are given."""
    modes = function_modes()
    if not modes and has_torch_function((x,)):
        return False
    for mode in modes:
        if not (isinstance(x, Tensor) and type(mode).__module__.startswith(_HARMLESS_MODES)):
            return False
    if is_differentiated_forward():
        return False
    return x.is_cpu or x.is_meta or (x.is_cuda and ops.is_served(x.device))


def _is_context(context: Any, hidden_states: Tensor) -> bool:
    return isinstance(context, Tensor) and context.dim() == 3 and context.shape[0] == hidden_states.shape[0]


def _is_mask(attention: Any, mask: Any, hidden_states: Tensor, context: Tensor | None) -> bool:
    """Whether a kernel takes it, with the tokens of the context, and nobody else is to prepare it.

    On GPUs masks stay with PyTorch's attention: nobody has measured ours there.
    """
    samples = len(hidden_states)
    queries = math.prod(hidden_states.shape[2:]) if hidden_states.dim() == 4 else hidden_states.shape[1]
    keys = queries if context is None else context.shape[1]
    return (
        isinstance(mask, Tensor)
        and mask.is_cpu
        and not mask.requires_grad
        and mask.dtype in (torch.bool, torch.float32, hidden_states.dtype)
        and mask.dim() == 3
        and mask.shape[0] in (samples, samples * attention.heads)
        and mask.shape[1] in (1, queries)
        and mask.shape[2] == keys
        and attention_processor.Attention.prepare_attention_mask is _PREPARE
        and "prepare_attention_mask" not in vars(attention)
    )


# Why a call would be diffusers' own, as things are now; None if it would run on our kernels. Cheap, as every call asks.


def _why_norm_is_theirs() -> str | None:
    if (
        nn.GroupNorm.forward is not _GROUP_NORM_FORWARD
        or F.group_norm is not _GROUP_NORM
        or torch.group_norm is not _GROUP_NORM_KERNEL
    ):
        return "PyTorch's group norm was replaced"
    return None


def _why_block_is_theirs(block: Any) -> str | None:
    if block.upsample is not None or block.downsample is not None:
        return f"it {'up' if block.up else 'down'}samples between its norm and its convolution; its norms are replaced"
    # An autoencoder's are called "group" or something else, but have no embedding.
    embedding = block.time_embedding_norm
    if embedding != "default" and (embedding == "scale_shift") == (block.time_emb_proj is None):
        return f"its time_embedding_norm is {embedding}; its norms are replaced"
    act = block.nonlinearity
    if type(act) is not nn.SiLU:
        return f"its activation is {type(act).__name__}, not SiLU; its norms are replaced"
    for name, module, kind in (
        ("norm1", block.norm1, GroupNorm),
        ("norm2", block.norm2, GroupNorm),
        (None, act, nn.SiLU),
    ):
        if (reason := _why_must_be_called(module, kind)) is not None:
            return f"its {name or 'activation'} {reason}"
    if _are_calls_seen(GroupNorm, nn.SiLU):
        return "hooks of every module see its norms"
    if resnet.ResnetBlock2D.forward is not _BLOCK_FORWARD:
        return "diffusers' ResnetBlock2D was replaced"
    if nn.SiLU.forward is not _SILU_FORWARD or F.silu is not _SILU:
        return "PyTorch's SiLU was replaced"
    return _why_norm_is_theirs()


def _why_attention_is_theirs(attention: Any) -> str | None:
    processor = attention.processor
    if type(processor) is not AttnProcessor2_0:
        return f"its processor is {type(processor).__name__}, which may compute something else"
    if attention.spatial_norm is not None or attention.norm_q is not None or attention.norm_k is not None:
        name = next(name for name in ("spatial_norm", "norm_q", "norm_k") if getattr(attention, name) is not None)
        return f"it has a {name}, {type(getattr(attention, name)).__name__}"
    if attention.to_k is None or attention.to_out is None:
        return "it lacks a projection"
    if attention.inner_kv_dim != attention.inner_dim:
        return f"its heads share keys: q has {attention.inner_dim} channels, k {attention.inner_kv_dim}"
    if (norm := attention.group_norm) is not None:
        if (reason := _why_must_be_called(norm, GroupNorm)) is not None:
            return f"its group_norm {reason}"
        if _are_calls_seen(GroupNorm):
            return "hooks of every module see its group_norm"
        if (reason := _why_norm_is_theirs()) is not None:
            return reason
    if attention_processor.Attention.forward is not _ATTENTION_FORWARD or AttnProcessor2_0.__call__ is not _PROCESS:
        return "diffusers' attention was replaced"
    if F.scaled_dot_product_attention is not _ATTENTION:
        return "PyTorch's attention was replaced"
    return None


def _why(ask: Callable[[Any], str | None], module: nn.Module) -> str | None:
    try:
        return ask(module)
    except AttributeError as error:
        return f"it has lost what a {type(module).__name__} has: {error}"


def _why_must_be_called(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a kernel may not do this module's work without a call of it."""
    if _has_own_forward(module, kind):
        return _OWN_FORWARD
    if _has_hooks(module):
        return "has hooks"
    if type(module) is not kind:
        name = type(module).__name__
        return "is not accelerated" if name == kind.__name__ else f"is a {name}, which may compute something else"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _are_projections_seen(attention: Any) -> bool:
    return (
        bool(has_global_hook())
        or _has_hooks(attention.to_q)
        or _has_hooks(attention.to_k)
        or _has_hooks(attention.to_v)
    )


def _has_own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether somebody gave a module of a class of ours, or of the class below, a forward of its own.

    Hooks of diffusers and accelerate that are removed leave the method of the class there, bound: that is none.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    if getattr(forward, "__self__", None) is not module:
        return True
    theirs: Any = kind.__bases__[0]
    return getattr(forward, "__func__", None) not in (kind.forward, theirs.forward)


def _drop_bound_forward(module: nn.Module, kind: type[nn.Module]) -> None:
    """Lets the class say what ``forward`` is, where removed hooks left the method of a former one."""
    if "forward" in vars(module) and not _has_own_forward(module, kind):
        del module.forward


def _are_calls_seen(*kinds: type[nn.Module]) -> bool:
    """Whether somebody sees each call of modules of these classes."""
    if has_global_hook():
        return True
    for kind in kinds:
        call = kind.__call__
        # While it exports a program, PyTorch notes which module it is in.
        if call is not _CALL and not getattr(call, "__globals__", {}).get("__name__", "").startswith(_HARMLESS_MODES):
            return True
    return False


# What an Acceleration can undo. A copy of a module is not in here until it is accelerated itself.
_held: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Replaced:
    """A module that was given a class of ours."""

    def __init__(self, name: str, module: nn.Module, kind: type[nn.Module], block: nn.Module | None):
        self.name, self.module, self.kind = name, module, kind
        # The block that takes this norm along.
        self.block = block

    def told(self) -> tuple[Part, bool] | None:
        block = self.block
        if isinstance(block, ResnetBlock2D) and _why(_why_block_is_theirs, block) is None:
            return None
        what, reason = self._told()
        if _has_own_forward(self.module, _OURS[self.kind]):
            reason = f"it {_OWN_FORWARD}"
        return Part(self.name, self.kind.__name__, what if reason is None else reason), reason is None

    def _told(self) -> tuple[str, str | None]:
        module: Any = self.module
        if self.kind is nn.GroupNorm:
            return "group_norm", _why_norm_is_theirs()
        if self.kind is attention_processor.Attention:
            return "attention on views of the projections", _why(_why_attention_is_theirs, module)
        embedding = ""
        if getattr(module, "time_emb_proj", None) is not None:
            scaled = getattr(module, "time_embedding_norm", None) == "scale_shift"
            embedding = f", the embedding {'scaling' if scaled else 'added'}"
        return f"group_norm with SiLU, twice{embedding}", _why(_why_block_is_theirs, module)

    def undo(self) -> None:
        _held.discard(self.module)
        _drop_bound_forward(self.module, _OURS[self.kind])
        self.module.__class__ = _given_back(type(self.module), _OURS[self.kind], self.kind)


def _given_back(kind: type, ours: type, theirs: type) -> type:
    """The class with ``theirs`` in the place of ``ours``, of which sharding or a parametrization made a subclass."""
    if kind is ours:
        return theirs
    if not issubclass(kind, ours):
        return kind
    bases = tuple(_given_back(base, ours, theirs) for base in kind.__bases__)
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(kind.__name__, bases, exec_body=lambda namespace: namespace.update(members))


def replacements(model: nn.Module, name: str = "") -> Iterator[Replacement]:
    """Replaces what can be replaced in a module and those in it, and tells of each when it is done."""
    block_of: dict[nn.Module, nn.Module] = {}
    is_empty = True
    for path, module in list(model.named_modules()):
        its_name = ".".join(filter(None, (name, path))) or type(module).__name__
        kind = next((kind for kind in _OURS if isinstance(module, kind)), None)
        if kind is not None:
            reason = _replace(module, kind)
            if kind is resnet.ResnetBlock2D and isinstance(module, ResnetBlock2D):
                block_of |= {getattr(module, norm): module for norm in ("norm1", "norm2")}
        elif isinstance(module, resnet.ResnetBlockCondNorm2D):
            reason = "its norms take the embedding in another way"
        elif hasattr(module, "processor"):
            reason = f"it is a {type(module).__name__}, which may compute something else"
        else:
            continue
        is_empty = False
        if kind is not None and reason is None:
            yield _Replaced(its_name, module, kind, block_of.get(module))
        elif reason != ALREADY or not isinstance(block_of.get(module), ResnetBlock2D):
            yield Left(Part(its_name, (kind or type(module)).__name__, reason or ""))
    if is_empty:
        reason = "it has no GroupNorm, ResnetBlock2D or Attention of diffusers"
        yield Left(Part(name or type(model).__name__, type(model).__name__, reason))


def _replace(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Gives a module our class. Returns why not, if it was not done."""
    if isinstance(module, _OURS[kind]):
        if module in _held:
            return ALREADY
    elif isinstance(module, ours.GroupNorm):
        return ALREADY
    elif type(module) is not kind:
        return f"it is a {type(module).__name__}, which may compute something else"
    elif _has_own_forward(module, _OURS[kind]):
        return f"it {_OWN_FORWARD}"
    else:
        _drop_bound_forward(module, _OURS[kind])
        module.__class__ = _OURS[kind]
    _held.add(module)
    return None
