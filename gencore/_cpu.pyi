from typing import Any

def build_info() -> dict[str, Any]: ...
def openmp_address() -> int: ...
def simd_level() -> str: ...
def set_simd_level(level: str, /) -> None: ...
def multiplications_per_second() -> float: ...
def vector_instructions_per_second() -> float: ...
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
