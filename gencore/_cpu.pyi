from typing import Any

def build_info() -> dict[str, Any]: ...
def openmp_address() -> int: ...
def simd_level() -> str: ...
def set_simd_level(level: str, /) -> None: ...
def multiplications_per_second() -> float: ...
def vector_instructions_per_second() -> float: ...
def multiply_adds_per_second(of_bfloat16: bool, /) -> float: ...
def request_huge_pages(memory: int, nbytes: int, /) -> None: ...
def normal(
    out: int, dtype: int, samples: int, elements: int, channels: int, key: int, key_rows: int, threads: int, /
) -> None: ...
def uniform(
    out: int, dtype: int, samples: int, elements: int, channels: int, key: int, key_rows: int, threads: int, /
) -> None: ...
def reparameterize(
    mu: int,
    logvar: int,
    z: int,
    slope: int,
    kl: int,
    dtype: int,
    samples: int,
    draws: int,
    elements: int,
    channels: int,
    key: int,
    key_rows: int,
    threads: int,
    /,
) -> None: ...
def reparameterize_backward(
    grad_z: int,
    grad_kl: int,
    mu: int,
    logvar: int,
    grad_mu: int,
    grad_logvar: int,
    dtype: int,
    samples: int,
    draws: int,
    elements: int,
    channels: int,
    key: int,
    key_rows: int,
    threads: int,
    /,
) -> None: ...
def add_noise(
    x0: int,
    x_t: int,
    noise: int,
    dtype: int,
    samples: int,
    elements: int,
    channels: int,
    table: tuple[int, int, int, bool],
    key: int,
    key_rows: int,
    threads: int,
    /,
) -> None: ...
def denoising_loss(
    output: int,
    x0: int,
    noise: int,
    loss: int,
    dtype: int,
    samples: int,
    elements: int,
    channels: int,
    learned: bool,
    table: tuple[int, int, int, bool],
    key: int,
    key_rows: int,
    threads: int,
    /,
    error: int = 0,
) -> None: ...
def denoising_loss_backward(
    grad_loss: int,
    output: int,
    x0: int,
    noise: int,
    grad_output: int,
    dtype: int,
    samples: int,
    elements: int,
    channels: int,
    learned: bool,
    table: tuple[int, int, int, bool],
    key: int,
    key_rows: int,
    threads: int,
    /,
) -> None: ...
def denoising_loss_scale(
    grad_loss: int,
    error: int,
    dtype: int,
    samples: int,
    elements: int,
    channels: int,
    table: tuple[int, int, int, bool],
    key: int,
    key_rows: int,
    threads: int,
    /,
) -> None: ...
def diffusion_step(
    addresses: list[int],
    dtype: int,
    samples: int,
    elements: int,
    channels: int,
    learned: bool,
    second_learned: bool,
    table: tuple[int, int, int, bool],
    key: int,
    key_rows: int,
    threads: int,
    /,
) -> None: ...
def attention(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    out: tuple[int, ...],
    lse: int,
    dtype: int,
    sizes: tuple[int, ...],
    scale: float,
    threads: int,
    /,
) -> None: ...
def attention_backward(
    tensors: list[tuple[int, ...]],
    lse: int,
    grads: list[tuple[int, ...] | None],
    dtype: int,
    sizes: tuple[int, ...],
    scale: float,
    threads: int,
    /,
) -> None: ...
def attention_jvp(
    tensors: list[tuple[int, ...]],
    lse: int,
    direction: list[tuple[int, ...] | None],
    d_out: tuple[int, ...],
    d_lse: int,
    dtype: int,
    sizes: tuple[int, ...],
    scale: float,
    threads: int,
    /,
) -> None: ...
def attention_double_backward(
    tensors: list[tuple[int, ...]],
    lse: int,
    direction: list[tuple[int, ...] | None],
    grads: list[tuple[int, ...] | None],
    dtype: int,
    sizes: tuple[int, ...],
    scale: float,
    threads: int,
    /,
) -> None: ...
def group_norm(
    x: int,
    y: int,
    statistics: int,
    dtype: int,
    shape: tuple[int, ...],
    groups: int,
    channels_last: bool,
    eps: float,
    activation: int,
    values: tuple[tuple[int, int, int] | None, ...],
    threads: int,
    /,
) -> None: ...
def group_norm_backward(
    grad_y: int,
    x: int,
    statistics: int,
    dtype: int,
    shape: tuple[int, ...],
    groups: int,
    channels_last: bool,
    activation: int,
    values: tuple[tuple[int, int, int] | None, ...],
    grads: list[int],
    threads: int,
    /,
) -> None: ...
def group_norm_jvp(
    x: int,
    d_y: int,
    statistics: int,
    dtype: int,
    shape: tuple[int, ...],
    groups: int,
    channels_last: bool,
    activation: int,
    values: tuple[tuple[int, int, int] | None, ...],
    d_x: int,
    d_values: tuple[tuple[int, int, int] | None, ...],
    threads: int,
    /,
) -> None: ...
def group_norm_double_backward(
    grad_y: int,
    x: int,
    statistics: int,
    dtype: int,
    shape: tuple[int, ...],
    groups: int,
    channels_last: bool,
    activation: int,
    values: tuple[tuple[int, int, int] | None, ...],
    d_x: int,
    d_values: tuple[tuple[int, int, int] | None, ...],
    grads: list[int],
    threads: int,
    /,
) -> None: ...
