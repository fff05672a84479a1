from typing import Any

def build_info() -> dict[str, Any]: ...
def openmp_address() -> int: ...
def simd_level() -> str: ...
def set_simd_level(level: str, /) -> None: ...
def multiplications_per_second() -> float: ...
def vector_instructions_per_second() -> float: ...
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
