"""The ops, a row each: the names that every room has of them.

What is listed by op elsewhere follows from these rows, or is held to them by a test: the kernels that tables choose
among, Triton's, the functions in PyTorch's operations, what benchmarks run, and the cases that a user's file may have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

# The last: in forward mode, and of second order.
Direction = Literal["forward", "backward", "second"]
Family = Literal["convolution", "attention", "norm, activation", "noise, diffusion, VAE"]


class Kernel(NamedTuple):
    """A kernel, by the name that the library and the backends have for it.

    Attributes:
        name: of the kernel.
        direction: what it computes; None for those that some backends do without, which no table chooses among.
        main: the place of the argument that says what the problem is.
        table: the name of the table that chooses, where it is not that of the op.
    """

    name: str
    direction: Direction | None = None
    main: int = 0
    table: str | None = None


class Op(NamedTuple):
    """An op.

    Attributes:
        stem: the name of its file in every room.
        functions: the public ones, and the kernel that each calls.
        kernels: those that there are.
        timed: the benchmark of its forward pass that tables are made from, and that of its gradient, alone or with the
            forward pass.
        family: of its time in a profile.
        keys: those that a case in a user's file may have besides its shape and layout.
    """

    stem: str
    functions: Mapping[str, str]
    kernels: Sequence[Kernel]
    timed: tuple[str, str | None]
    family: Family = "noise, diffusion, VAE"
    keys: Sequence[str] = ()


# In the order in which they are run and reported.
OPS = (
    Op("normal", {"normal": "normal_"}, (Kernel("normal_", "forward"),), ("forward into a given tensor", None)),
    Op("uniform", {"uniform": "uniform_"}, (Kernel("uniform_", "forward"),), ("forward into a given tensor", None)),
    Op(
        "reparameterize",
        {"reparameterize": "reparameterize", "reparameterize_kl": "reparameterize_kl"},
        (
            Kernel("reparameterize", "forward"),
            Kernel("reparameterize_kl", "forward"),
            Kernel("reparameterize_and_slope", "forward"),
            Kernel("reparameterize_backward", "backward", 3),
        ),
        ("forward", "backward"),
        keys=("draws",),
    ),
    Op("add_noise", {"add_noise": "add_noise"}, (Kernel("add_noise", "forward"),), ("forward", None)),
    Op(
        "diffusion_step",
        {"diffusion_step": "diffusion_step"},
        (Kernel("diffusion_step", "forward"),),
        ("DDPM step", None),
    ),
    Op(
        "denoising_loss",
        {"denoising_loss": "denoising_loss", "variational_bound": "denoising_loss"},
        (
            Kernel("denoising_loss", "forward", 1),
            Kernel("denoising_loss_backward", "backward", 2),
            Kernel("denoising_loss_and_error"),
            Kernel("denoising_loss_scale"),
        ),
        ("forward", "forward and backward"),
    ),
    Op(
        "group_norm",
        {"group_norm": "group_norm"},
        (
            Kernel("group_norm", "forward"),
            Kernel("group_norm_backward", "backward", 1),
            Kernel("group_norm_jvp"),
            Kernel("group_norm_double_backward"),
        ),
        ("forward", "forward and backward"),
        "norm, activation",
        ("groups",),
    ),
    Op(
        "bias_act",
        {"bias_act": "bias_act"},
        (
            Kernel("bias_act", "forward"),
            Kernel("bias_act_backward", "backward", 1),
            Kernel("bias_act_double_backward"),
        ),
        ("forward", "forward and backward"),
        "norm, activation",
    ),
    Op(
        "attention",
        {"attention": "attention", "spatial_attention": "attention"},
        (
            Kernel("attention", "forward"),
            Kernel("attention_backward", "backward", 1),
            Kernel("attention_jvp", "second"),
            Kernel("attention_double_backward", "second", 1),
            Kernel("general_attention", "forward", table="general_attention"),
            Kernel("general_attention_backward", "backward", 1, "general_attention"),
            Kernel("general_attention_mask_backward"),
            Kernel("general_attention_jvp", "second", table="general_attention"),
            Kernel("general_attention_double_backward", "second", 1, "general_attention"),
        ),
        ("forward", "forward and backward"),
        "attention",
    ),
    Op(
        "upfirdn2d",
        dict.fromkeys(("upfirdn2d", "upsample2d", "downsample2d", "filter2d"), "upfirdn2d"),
        (Kernel("upfirdn2d", "forward"),),
        ("upsampling", None),
        "convolution",
    ),
)


def op_of(name: str) -> Op | None:
    """The op that a function or any op of the library's is of, such as "spatial_attention_backward"."""
    return next((op for op in OPS if name in op.functions or op.stem in name), None)
