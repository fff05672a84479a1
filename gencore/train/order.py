"""The order of the data and the keys of the noise: pure functions of the seed and the step.

Nothing here has a state that would have to be saved: what step 1000 sees is known without steps 0 to 999.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gencore.noise import Key, reference_bits

# Keys of the order, of the noise and of the data are folded with different tags, so that none can meet another's bits.
_ORDER, _NOISE, _DATA = 0, 1, 2


@lru_cache(maxsize=4)
def _permutation(seed: int, phase: int, epoch: int, images: int) -> np.ndarray:
    key = Key(seed).fold_in(_ORDER).fold_in(phase).fold_in(epoch)
    high, low = reference_bits((2, images), key).astype(np.uint64)
    # 64 bits per image: ties, which would make some orders likelier than others, do not happen in practice.
    return np.argsort(high << np.uint64(32) | low, kind="stable")


def batch_indices(seed: int, phase: int, draw: int, batch_size: int, images: int) -> Tensor:
    """Which images the ``draw``-th minibatch of a phase holds: int64 (batch_size,), a pure function of its arguments.

    The minibatches of a phase cut one endless sequence, epoch after epoch, each epoch a new permutation of all
    ``images``; a minibatch may end one epoch and begin the next, so every image is seen equally often.

    Raises:
        ValueError: the data set is empty.
    """
    if images < 1:
        raise ValueError("the data set holds no images")
    first = draw * batch_size
    parts, position, end = [], first, first + batch_size
    while position < end:
        epoch, offset = divmod(position, images)
        part = _permutation(seed, phase, epoch, images)[offset : offset + end - position]
        parts.append(part)
        position += len(part)
    return torch.from_numpy(np.concatenate(parts))


def phase_key(seed: int, step: int, phase: int, repetition: int) -> Key:
    """The key of one repetition of a phase (its index) in a step: all noise of that repetition comes from it."""
    return Key(seed).fold_in(_NOISE).fold_in(step).fold_in(phase << 32 | repetition)


def data_key(seed: int, step: int, phase: int, repetition: int) -> Key:
    """The key of the minibatch that a repetition of a phase draws: what is random in it (flips, crops, pairs)."""
    return Key(seed).fold_in(_DATA).fold_in(step).fold_in(phase << 32 | repetition)
