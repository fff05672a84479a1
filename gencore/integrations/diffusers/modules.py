"""Modules of diffusers on our kernels. A module changes its class, so that it keeps every attribute that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from gencore import ops
from gencore.integrations.diffusers.acceleration import ALREADY, Change, Part
from gencore.nn import GroupNorm
from gencore.ops.group_norm import Activation

# In these, conv_act follows conv_norm_out and nothing else does.
_WITH_LAST_NORM = (UNet2DModel, UNet2DConditionModel, Encoder, Decoder)


class FusedGroupNorm(GroupNorm):
    """A ``torch.nn.GroupNorm`` whose class was changed."""

    activation: Activation | None = None


class FusedGroupNormSiLU(GroupNorm):
    """A ``torch.nn.GroupNorm`` whose class was changed, before a SiLU that was taken away."""

    activation: Activation | None = "silu"


class FusedResnetBlock2D(ResnetBlock2D):
    """A ``ResnetBlock2D`` whose class was changed: both norms with their SiLU and the embedding are one kernel each."""

    def forward(self, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Tensor:
        projection = self.time_emb_proj
        if args or kwargs or (temb is None) != (projection is None) or not _is_of_samples(temb, input_tensor):
            output: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return output
        modulation: dict[str, Tensor] = {}
        if temb is not None:
            embedded = projection(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                modulation["scale"], modulation["shift"] = embedded.chunk(2, dim=1)
            else:
                modulation["bias_in"] = embedded
        hidden = self.conv1(_norm_and_silu(self.norm1, input_tensor))
        hidden = self.conv2(self.dropout(_norm_and_silu(self.norm2, hidden, **modulation)))
        if self.conv_shortcut is not None:
            # diffusers makes the input contiguous first while it trains, against a warning of DistributedDataParallel.
            # That is another pass, and a change of the format in channels_last.
            input_tensor = self.conv_shortcut(input_tensor)
        hidden = input_tensor + hidden
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


def _is_of_samples(temb: Any, x: Tensor) -> bool:
    return temb is None or bool(temb.dim() == 2 and temb.shape[0] == x.shape[0])


def _norm_and_silu(norm: nn.GroupNorm, x: Tensor, **modulation: Tensor) -> Tensor:
    return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="silu", **modulation)


class GencoreAttnProcessor:
    """What ``AttnProcessor2_0`` does, with our kernel on views of the projections; with a mask, what it does itself.

    Args:
        former: the processor in whose place this one is.
    """

    def __init__(self, former: AttnProcessor | AttnProcessor2_0):
        self.former = former

    # The names are those that Attention looks for when it passes arguments on.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or args or kwargs:
            output: Tensor = self.former(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return output
        tokens = hidden_states
        is_image = hidden_states.dim() == 4
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens if is_image else tokens.transpose(1, 2))
            tokens = tokens if is_image else tokens.transpose(1, 2)
        if is_image:
            # Of an image in channels_last that is a view; else a copy, which three projections read.
            tokens = tokens.flatten(2).transpose(1, 2).contiguous()
        context = tokens
        if encoder_hidden_states is not None:
            normed = attn.norm_cross is not None
            context = attn.norm_encoder_hidden_states(encoder_hidden_states) if normed else encoder_hidden_states
        q, k, v = (
            projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(tokens), attn.to_k(context), attn.to_v(context))
        )
        scale = None if isinstance(self.former, AttnProcessor2_0) else float(attn.scale)
        # The result lies in memory as q does, so that the heads come back together without a copy.
        mixed = ops.attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](mixed))
        if is_image:
            output = output.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if attn.residual_connection:
            output = hidden_states + output
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def changes(model: nn.Module, prefix: str = "") -> Iterator[Change]:
    """Replaces what can be replaced in a module and those in it, and tells of each when it is done."""
    taken: set[nn.Module] = set()
    # What is found first is the module around, which may take what is in it.
    for path, module in list(model.named_modules()):
        name = prefix + path if path else prefix.removesuffix(".") or type(module).__name__
        if module in taken:
            continue
        if isinstance(module, ResnetBlock2D):
            undo, reason = _replace_class(module, FusedResnetBlock2D, ResnetBlock2D, _refuse_block)
            if reason in (None, ALREADY):
                taken |= {module.norm1, module.norm2}
            scaled = module.time_embedding_norm == "scale_shift"
            embedding = "" if module.time_emb_proj is None else f", the embedding {'scaling' if scaled else 'added'}"
            yield _told(name, "ResnetBlock2D", undo, reason, f"group_norm with SiLU, twice{embedding}")
        elif isinstance(module, ResnetBlockCondNorm2D):
            yield _told(name, type(module).__name__, None, "its norms take the embedding in another way", "")
        elif isinstance(module, Attention):
            undo, reason = _replace_processor(module)
            yield _told(name, type(module).__name__, undo, reason, "attention on views of the projections")
        elif isinstance(module, nn.GroupNorm):
            undo, reason = _replace_class(module, FusedGroupNorm, nn.GroupNorm)
            yield _told(name, "GroupNorm", undo, reason, "group_norm")
        elif type(module) in _WITH_LAST_NORM and type(module.conv_norm_out) is nn.GroupNorm:
            undo, reason = _replace_last_norm(module)
            path_in = f"{path}." if path else ""
            if reason is None:
                taken.add(module.conv_norm_out)
                yield _told(f"{prefix}{path_in}conv_norm_out", "GroupNorm", undo, None, "group_norm with SiLU")
            else:
                yield _told(f"{prefix}{path_in}conv_act", type(module.conv_act).__name__, None, reason, "")


def _told(name: str, kind: str, undo: Callable[[], None] | None, reason: str | None, what: str) -> Change:
    return Change(Part(name, kind, what if reason is None else reason), undo)


def _replace_class(
    module: nn.Module, by: type, only: type, refuse: Callable[[Any], str | None] = lambda _: None
) -> tuple[Callable[[], None] | None, str | None]:
    """Gives a module another class. Returns what undoes that; or None, and why it was not done."""
    if isinstance(module, (FusedResnetBlock2D, GroupNorm)):
        return None, ALREADY
    if type(module) is not only:
        return None, f"it is a {type(module).__name__}, which may compute something else"
    if "forward" in vars(module):
        return None, "it has a forward of its own"
    if (reason := refuse(module)) is not None:
        return None, reason
    module.__class__ = by

    def undo() -> None:
        if type(module) is by:
            module.__class__ = only

    return undo, None


def _replace_last_norm(module: Any) -> tuple[Callable[[], None] | None, str | None]:
    """Lets the norm before the last convolution take the SiLU after it."""
    act = module.conv_act
    if type(act) is not nn.SiLU:
        return None, f"its norm takes a SiLU along only, and this is a {type(act).__name__}"
    if (reason := _hooks(act)) is not None:
        return None, reason
    restore_class, reason = _replace_class(module.conv_norm_out, FusedGroupNormSiLU, nn.GroupNorm)
    if restore_class is None:
        return None, f"its norm was left as it was: {reason}"
    # Not another class for the SiLU: older versions of diffusers share one among all modules.
    module.conv_act = identity = nn.Identity()

    def undo() -> None:
        restore_class()
        if module.conv_act is identity:
            module.conv_act = act

    return undo, None


def _refuse_block(block: ResnetBlock2D) -> str | None:
    if block.upsample is not None or block.downsample is not None:
        return f"it {'up' if block.up else 'down'}samples between its norm and its convolution; its norms are replaced"
    # An autoencoder's are called "group" or something else, but have no embedding.
    if block.time_embedding_norm != "default" and (block.time_embedding_norm == "scale_shift") == (
        block.time_emb_proj is None
    ):
        return f"its time_embedding_norm is {block.time_embedding_norm}; its norms are replaced"
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU; its norms are replaced"
    for name in ("norm1", "norm2"):
        if type(norm := getattr(block, name)) is not nn.GroupNorm:
            return f"its {name} is a {type(norm).__name__}, which may compute something else"
        if "forward" in vars(norm):
            return f"its {name} has a forward of its own"
    for name in ("norm1", "norm2", "nonlinearity"):
        if (reason := _hooks(getattr(block, name))) is not None:
            return f"its {name}: {reason}"
    return None


def _hooks(module: nn.Module) -> str | None:
    of_forward = (module._forward_hooks, module._forward_pre_hooks)
    of_backward = (module._backward_hooks, module._backward_pre_hooks)
    return "hooks are registered on it, which would not be called" if any((*of_forward, *of_backward)) else None


def _replace_processor(attention: Any) -> tuple[Callable[[], None] | None, str | None]:
    former: Any = attention.processor
    if type(former) is GencoreAttnProcessor:
        return None, ALREADY
    if type(attention) is not Attention:
        return None, f"it is a {type(attention).__name__}, which may compute something else"
    if "forward" in vars(attention):
        return None, "it has a forward of its own"
    if type(former) not in (AttnProcessor, AttnProcessor2_0):
        return None, f"its processor is {type(former).__name__}, which may compute something else"
    if (reason := _refuse_attention(attention)) is not None:
        return None, reason
    ours: Any = GencoreAttnProcessor(former)
    attention.processor = ours

    def undo() -> None:
        if attention.processor is ours:
            attention.processor = former

    return undo, None


def _refuse_attention(attention: Any) -> str | None:
    for name in ("spatial_norm", "norm_q", "norm_k"):
        if (norm := getattr(attention, name)) is not None:
            return f"it has a {name}, {type(norm).__name__}"
    if attention.to_k is None or attention.to_out is None:
        return "it lacks a projection"
    if attention.inner_kv_dim != attention.inner_dim:
        return f"its heads share keys: q has {attention.inner_dim} channels, k {attention.inner_kv_dim}"
    return None
