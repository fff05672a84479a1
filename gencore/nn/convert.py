"""Weights of other libraries in the modules of this one; none of those libraries is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gencore.arguments import as_int
from gencore.nn.attention import SpatialCrossAttention, SpatialSelfAttention
from gencore.nn.unet import UNet

# What the constructor of UNet2DModel takes, with its defaults: configurations of older versions lack the newer ones.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
_WITHOUT_EFFECT = {"sample_size", "num_train_timesteps"}
_EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
# A block's type: whether it has attention.
_DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}
_UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}

# Our names' parts, where theirs are others.
_PARTS = {
    "down": "down_blocks",
    "middle": "mid_block",
    "up": "up_blocks",
    "residual": "resnets",
    "attention": "attentions",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
    "embedding": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "linear1": "linear_1",
    "linear2": "linear_2",
    "norm": "group_norm",
    "out": "to_out.0",
    "norm_out": "conv_norm_out",
}
# Of an Attention, those that compute it by the same formula.
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
# What attention's layers were called when the checkpoints of 2022 were published.
_OLD_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(?<=attentions\.)(\d+)\.({'|'.join(_OLD_LAYERS)})\.")


def unet_from_diffusers(source: nn.Module | Mapping[str, Any], state_dict: Mapping[str, Tensor] | None = None) -> UNet:
    """A :class:`UNet` with the architecture and the weights of a ``diffusers.UNet2DModel``, in evaluation mode.

    It computes the same function: the results differ by the rounding of another order of summation only.

    Args:
        source: a ``UNet2DModel``, or its configuration (``config.json`` as a mapping).
        state_dict: the weights by diffusers' names, today's or those of the checkpoints of 2022 (attention's ``query``,
            ``key``, ``value`` and ``proj_attn``). Only with a configuration.

    Returns:
        A model whose parameters are copies of those given, with their dtype and device. The sine-cosine order and the
        three projections of attention are matters of their place in a matrix here. ``num_class_embeds`` becomes as many
        classes; the null label, which diffusers does not have, adds nothing to the embedding.

    Raises:
        ValueError: the configuration has what :class:`UNet` cannot express, or weights are missing, too many or of
            another shape. Every such fault is named.

    >>> config = {"block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "FirDownBlock2D"), "norm_eps": 1}
    >>> unet_from_diffusers({**config, "up_block_types": ("UpBlock2D", "UpBlock2D")}, {})
    Traceback (most recent call last):
    ValueError: UNet cannot express this configuration of a UNet2DModel:
      down_block_types: must be of DownBlock2D, AttnDownBlock2D, was ('DownBlock2D', 'FirDownBlock2D')
    """
    if isinstance(source, nn.Module):
        if state_dict is not None:
            raise TypeError("state_dict must be left out where source is a model")
        config, state_dict = getattr(source, "config", None), source.state_dict()
    else:
        config = source
    if not isinstance(config, Mapping):
        raise TypeError(f"source must be a UNet2DModel or its configuration, got {type(source).__name__}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    settings = {**_DEFAULTS, **{name: value for name, value in config.items() if not name.startswith("_")}}
    _raise_if("UNet cannot express this configuration of a UNet2DModel", _config_faults(config, settings))
    # No memory, and nothing of the generator of random numbers, is spent on weights that are to be replaced.
    with torch.device("meta"):
        unet = UNet(**_arguments(settings))
    flipped = settings["flip_sin_to_cos"]
    unet.load_state_dict(_converted(unet, _todays_names(state_dict), flipped), assign=True)
    return unet.eval()


def attention_from_diffusers(source: nn.Module) -> SpatialSelfAttention | SpatialCrossAttention:
    """The module that computes what a ``diffusers.models.attention_processor.Attention`` does with an image.

    The results differ by the rounding of another order of summation only.

    Args:
        source: an ``Attention`` with a group norm, projections back to its channels and a residual connection, as it
            stands in U-Nets of pixels and in autoencoders.

    Returns:
        A :class:`SpatialSelfAttention`, or a :class:`SpatialCrossAttention` if ``source`` has a
        ``cross_attention_dim``, whose parameters are copies of those of ``source``, with their dtype and device.
        Projections without a bias get one of zeros.

    Raises:
        TypeError: ``source`` is no such module.
        ValueError: it has settings that the modules cannot express. Every one of them is named.
    """
    if not isinstance(source, nn.Module) or not all(hasattr(source, name) for name in ("to_q", "heads", "group_norm")):
        raise TypeError(f"source must be an Attention of diffusers, got {type(source).__name__}")
    _raise_if("no module of gencore expresses this Attention", _settings_of_attention(source))
    return _converted_attention(source)


def _converted_attention(source: Any) -> SpatialSelfAttention | SpatialCrossAttention:
    norm, crossed = source.group_norm, bool(source.is_cross_attention)
    options: dict[str, Any] = {"num_heads": source.heads, "num_groups": norm.num_groups, "eps": norm.eps}
    attention: SpatialSelfAttention | SpatialCrossAttention
    with torch.device("meta"):
        if crossed:
            attention = SpatialCrossAttention(norm.num_channels, source.to_k.in_features, **options)
        else:
            attention = SpatialSelfAttention(norm.num_channels, **options)
    parts = {"q": [source.to_q], "kv": [source.to_k, source.to_v]}
    parts = parts if crossed else {"qkv": [*parts["q"], *parts["kv"]]}
    converted = {f"norm.{name}": tensor.detach().clone() for name, tensor in norm.named_parameters()}
    for name, layers in {**parts, "out": [source.to_out[0]]}.items():
        converted[f"{name}.weight"] = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        converted[f"{name}.bias"] = torch.cat([bias.detach() for bias in biases])
    attention.load_state_dict(converted, assign=True)
    return attention.train(source.training)


def _settings_of_attention(source: Any) -> Iterable[str]:
    """What of an Attention's settings our modules lack."""
    processor = type(source.processor).__name__
    if processor not in _PROCESSORS:
        yield f"processor: must be {' or '.join(_PROCESSORS)}, was {processor}"
    if source.group_norm is None:
        yield "norm_num_groups: must be a number of groups, was None"
    for name, layer in (
        ("spatial_norm_dim", source.spatial_norm),
        ("cross_attention_norm", source.norm_cross),
        ("qk_norm", source.norm_q if source.norm_q is not None else source.norm_k),
    ):
        if layer is not None:
            yield f"{name}: must be None, for no {type(layer).__name__}"
    if source.added_kv_proj_dim is not None:
        yield f"added_kv_proj_dim: must be None, was {source.added_kv_proj_dim}"
    width = source.to_q.in_features
    for name, features in (
        ("heads * dim_head", source.to_q.out_features),
        ("kv_heads * dim_head", width if source.to_k is None else source.to_k.out_features),
        ("out_dim", width if source.to_out is None else source.to_out[0].out_features),
    ):
        if features != width:
            yield f"{name}: must be query_dim, {width}, was {features}"
    if source.to_out is None:
        yield "pre_only: must be False, was True"
    elif source.to_out[1].p:
        yield f"dropout: must be 0, was {source.to_out[1].p}"
    # AttnProcessor2_0 takes 1 / sqrt(d) whatever scale_qk says.
    if not source.scale_qk and processor != "AttnProcessor2_0":
        yield "scale_qk: must be True, was False"
    if not source.residual_connection:
        yield "residual_connection: must be True, was False"
    if source.rescale_output_factor != 1:
        yield f"rescale_output_factor: must be 1, was {source.rescale_output_factor}"


def _raise_if(what: str, faults: Iterable[str]) -> None:
    if faults := list(faults):
        raise ValueError(f"{what}:\n" + "\n".join(f"  {fault}" for fault in faults))


def _config_faults(config: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterable[str]:
    if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        yield f"_class_name: must be UNet2DModel, was {kind}"
    for name in sorted(settings.keys() - _DEFAULTS.keys() - _WITHOUT_EFFECT):
        yield f"{name}: is not known, was {settings[name]!r}"
    for name, allowed in _EXPRESSIBLE.items():
        if settings[name] not in allowed:
            yield f"{name}: must be {' or '.join(map(repr, allowed))}, was {settings[name]!r}"
    known = True
    for name, kinds in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
        if not all(block in kinds for block in settings[name]):
            known = False
            yield f"{name}: must be of {', '.join(kinds)}, was {tuple(settings[name])}"
    down, up, levels = settings["down_block_types"], settings["up_block_types"], len(settings["block_out_channels"])
    if known and [_DOWN_BLOCKS[block] for block in down] != [_UP_BLOCKS[block] for block in reversed(up)]:
        yield f"up_block_types: must have attention where down_block_types, reversed, have it, was {tuple(up)}"
    if len(down) != levels:
        yield f"down_block_types: must be as many as block_out_channels, {levels}, was {len(down)}"
    groups, of_attention = settings["norm_num_groups"], settings["attn_norm_num_groups"]
    if not _is_count(groups):
        yield f"norm_num_groups: must be a number of groups, was {groups!r}"
    if of_attention is None and settings["resnet_time_scale_shift"] == "default":
        of_attention = groups
    if settings["add_attention"] and of_attention != groups:
        yield f"attn_norm_num_groups: must be norm_num_groups, {groups}, for a norm like the others, was {of_attention}"
    yield from _attention_faults(settings, [_DOWN_BLOCKS.get(block, False) for block in down])


def _attention_faults(settings: Mapping[str, Any], attends: list[bool]) -> Iterable[str]:
    size, widths = settings["attention_head_dim"], settings["block_out_channels"]
    attended = [width for width, attention in zip(widths, attends, strict=False) if attention]
    attended += widths[-1:] if settings["add_attention"] else ()
    if size is None:  # one head
        return
    if not _is_count(size):
        yield f"attention_head_dim: must be a number of channels or None, was {size!r}"
    elif indivisible := [width for width in attended if width % size]:
        yield f"attention_head_dim: must divide the channels at attention, {indivisible[0]}, was {size}"


def _is_count(value: Any) -> bool:
    number = as_int(value)
    return number is not None and number >= 1


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "in_channels": settings["in_channels"],
        "out_channels": settings["out_channels"],
        "channels": tuple(settings["block_out_channels"]),
        "blocks_per_level": settings["layers_per_block"],
        "attention_levels": tuple(i for i, block in enumerate(settings["down_block_types"]) if _DOWN_BLOCKS[block]),
        "middle_attention": settings["add_attention"],
        "head_size": settings["attention_head_dim"],
        "num_classes": settings["num_class_embeds"] or 0,
        "dropout": settings["dropout"],
        "scale_shift": settings["resnet_time_scale_shift"] == "scale_shift",
        "num_groups": settings["norm_num_groups"],
        "norm_eps": settings["norm_eps"],
        "embedding_size": settings["time_embedding_dim"],
        "frequency_shift": settings["freq_shift"],
        "asymmetric_downsampling": settings["downsample_padding"] == 0,
    }


def _todays_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    faults = []
    for name, tensor in state_dict.items():
        today = _OLD_NAME.sub(lambda found: f"{found[1]}.{_OLD_LAYERS[found[2]]}.", name)
        if today != name and today in state_dict:
            faults.append(f"{name}: is there as {today} too")
        renamed[today] = tensor
    _raise_if("the weights have two names", faults)
    return renamed


def _their_names(name: str, levels: int) -> list[str]:
    """The names of the tensors that, one after the other, make up ours.

    >>> _their_names("up.0.attention.1.qkv.bias", 4)[2]
    'up_blocks.3.attentions.1.to_v.bias'
    """
    parts = name.split(".")
    if parts[0] == "up":
        parts[1] = str(levels - 1 - int(parts[1]))
    theirs = ".".join(_PARTS.get(part, part) for part in parts)
    return [theirs.replace(".qkv.", f".to_{letter}.") for letter in ("qkv" if ".qkv." in theirs else "q")]


def _converted(unet: UNet, state_dict: Mapping[str, Tensor], flipped: bool) -> dict[str, Tensor]:
    wanted = unet.state_dict()
    sources = {name: _their_names(name, len(unet.channels)) for name in wanted}
    faults = []
    for name, theirs in sources.items():
        rows, *rest = wanted[name].shape
        # Ours has one row more, the null label's.
        shape = (rows - 1 if name == "class_embedding.weight" else rows // len(theirs), *rest)
        for source in theirs:
            if source not in state_dict:
                faults.append(f"{source}: is missing")
            elif state_dict[source].shape != shape:
                faults.append(f"{source}: must have the shape {shape}, was {tuple(state_dict[source].shape)}")
    expected = {source for theirs in sources.values() for source in theirs}
    faults += [f"{name}: is not expected" for name in state_dict if name not in expected]
    _raise_if("the weights are not those of the configuration", faults)

    converted = {name: torch.cat([state_dict[source] for source in theirs]) for name, theirs in sources.items()}
    if flipped:
        # Cosines before sines: the columns change their places instead.
        weight = converted["time_embedding.linear1.weight"]
        converted["time_embedding.linear1.weight"] = weight.roll(weight.shape[1] // 2, dims=1)
    if "class_embedding.weight" in converted:
        weight = converted["class_embedding.weight"]
        converted["class_embedding.weight"] = torch.cat((torch.zeros_like(weight[:1]), weight))
    return converted
