from typing import Any

def build_info() -> dict[str, Any]: ...
def unusable(device: int, /) -> str: ...
def normal(
    out: int,
    dtype: int,
    samples: int,
    elements: int,
    channels: int,
    key: int,
    key_rows: int,
    key_on_device: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
def uniform(
    out: int,
    dtype: int,
    samples: int,
    elements: int,
    channels: int,
    key: int,
    key_rows: int,
    key_on_device: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
def reparameterize_workspace(dtype: int, samples: int, draws: int, elements: int, channels: int, /) -> int: ...
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
    key_on_device: bool,
    device: int,
    stream: int,
    /,
    workspace: int = 0,
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
    key_on_device: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
