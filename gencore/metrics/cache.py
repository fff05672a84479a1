"""Features of real images, kept from one command to the next, by a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gencore.files import write_atomically

_NAME = "features"


def folder() -> Path:
    """Where they are kept: ``$GENCORE_CACHE``, or ``gencore`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``.

    Nothing in it is needed: it may be removed at any time.
    """
    own = os.environ.get("GENCORE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gencore"


def cached(parts: tuple[str, ...], compute: Callable[[], Tensor], place: Path | None = None) -> Tensor:
    """The tensor that was kept under the hash of ``parts``, or else what ``compute`` gives, which is kept.

    Files are safetensors, written whole or not at all. What cannot be read is computed anew, and where nothing can be
    written nothing is kept.

    Args:
        parts: what the tensor depends on: fingerprints of images and extractor, and which of the images.
        compute: gives it.
        place: the folder; None: :func:`folder`.
    """
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    path = (folder() if place is None else place) / f"{_NAME}-{digest}.safetensors"
    try:
        return safetensors.torch.load(path.read_bytes())[_NAME]
    except (OSError, SafetensorError, KeyError):
        pass
    found = compute()
    try:
        write_atomically(path, safetensors.torch.save({_NAME: found.contiguous()}))
    except OSError:
        return found
    return found
