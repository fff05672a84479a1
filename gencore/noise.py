"""Counter-based noise: keys, streams, sample ids, and the written definition of every noise value.

A noise value is a pure function of four integers, ``(seed, sample id, stream, element index)``: it does not
depend on the device, the SIMD level, the number of threads, the batch it is drawn in or the memory format.

**Bits.** Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Element ``e`` of
a sample, counted in logical C order, takes word ``e % 4`` of the block whose counter and key are::

    counter = (e // 4, stream, sample id mod 2^32, sample id div 2^32)      key = (seed mod 2^32, seed div 2^32)

**Uniform.** ``u = (word >> 8) * 2^-24``, in [0, 1).

**Normal.** Box and Muller (1958) on the word pairs (0, 1) and (2, 3) of a block, as a fixed sequence of IEEE-754
binary32 operations (:func:`box_muller`), so that every backend gives the same bits.

The functions named ``reference_*`` are the definition in NumPy. They are for reading and testing; the ops in
:mod:`gencore.ops` are the fast ones and agree with them to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencore._torch import (
    has_values,
    is_traced,
    is_wrapped,
    lifted,
    register_collation,
    register_loading,
    register_node,
)
from gencore.arguments import integer

_MASK32, _MASK63 = 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF
# The multipliers, what is added to the key, and what halves a product.
_PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 32, _MASK32)
_PHILOX_UINT64 = tuple(map(np.uint64, _PHILOX))
# Sample ids are at most 2^63 - 1, so no noise block has this fourth counter word: folded keys never reuse noise.
_FOLD_TAG = 0xFFFFFFFF
MAX_ELEMENTS_PER_SAMPLE = 1 << 34
_SEED_ONLY = torch.tensor((1, 0, 0), device="cpu")


def philox4x32(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two 32-bit words.

    The words are all of one kind: Python ints, integer NumPy arrays, or integer torch tensors; ints go with either.
    Ints and arrays hold values in [0, 2^32); the values of tensors are taken modulo 2^32, as looking at them would wait
    for their device. They broadcast. The result is ints, uint64 arrays or int64 tensors.

    Raises:
        TypeError: a word is no integer, or arrays and tensors are mixed.
        ValueError: a word is not in [0, 2^32), or there are not four and two of them.

    >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']

    Source: Salmon et al. (2011), section 3.3, with the constants of Random123.
    """
    if len(counter) != 4:
        raise ValueError(f"counter must hold 4 words, got {len(counter)}")
    if len(key) != 2:
        raise ValueError(f"key must hold 2 words, got {len(key)}")
    words = [_word(f"counter[{i}]", word) for i, word in enumerate(counter)]
    words += [_word(f"key[{i}]", word) for i, word in enumerate(key)]
    if not any(isinstance(word, (np.ndarray, np.uint64)) for word in words):
        return _rounds(words)
    if any(isinstance(word, Tensor) for word in words):
        raise TypeError("counter and key must hold NumPy arrays or torch tensors, got both")
    # NumPy before 2 makes floats of a uint64 and an int.
    return _rounds([np.asarray(word, np.uint64) for word in words], _PHILOX_UINT64)


def _rounds(words: Sequence[Any], constants: Sequence[Any] = _PHILOX) -> tuple[Any, Any, Any, Any]:
    """Philox's words of a counter and a key, which are of the kind of the constants or tensors."""
    c0, c1, c2, c3, k0, k1 = words
    m0, m1, w0, w1, half, mask = constants
    for _ in range(10):
        product0, product1 = c0 * m0, c2 * m1
        # The mask after the shift makes the arithmetic shift of signed torch integers a logical one.
        c0, c1, c2, c3 = (
            (product1 >> half) & mask ^ c1 ^ k0,
            product1 & mask,
            (product0 >> half) & mask ^ c3 ^ k1,
            product0 & mask,
        )
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return c0, c1, c2, c3


def _word(name: str, word: Any) -> Any:
    """The word in a type that holds its product with another one."""
    if isinstance(word, Tensor):
        if word.dtype == torch.bool or word.is_floating_point() or word.is_complex():
            raise TypeError(f"{name} must be of integers, got a tensor of {word.dtype}")
        return word.to(torch.int64) & _MASK32
    if isinstance(word, (np.ndarray, np.integer)):
        if word.dtype.kind not in "iu":
            raise TypeError(f"{name} must be of integers, got an array of {word.dtype}")
        if word.size and not (word.min() >= 0 and word.max() <= _MASK32):
            raise ValueError(f"{name} must be in [0, 2^32), got {word.min()} to {word.max()}")
        return word.astype(np.uint64)
    number = integer(name, word, what="an int, an array or a tensor of ints")
    if not 0 <= number <= _MASK32:
        raise ValueError(f"{name} must be in [0, 2^32), got {number}")
    return number


def _wrap_int64(name: str, value: int) -> int:
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return value - (1 << 64) if value >= 1 << 63 else value


def _integer(name: str, value: object, *, low: int, high: int) -> int:
    number = integer(name, value, what="an int or an int64 tensor")
    if not low <= number < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {number}")
    return number


def _check_int64_tensor(name: str, value: Tensor, max_dim: int) -> None:
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int or an int64 tensor, got a tensor of {value.dtype}")
    if value.dim() > max_dim:
        shapes = "a scalar" if max_dim == 0 else "a scalar or of shape (batch,)"
        raise ValueError(f"{name} must be {shapes}, got shape {tuple(value.shape)}")


class Key:
    """What noise depends on: a seed, a stream, and the ids of the samples. Immutable.

    ``Key(seed)`` numbers the samples of a batch 0, 1, 2, ... With one seed per sample, every sample has the id 0, so
    that a request served in any batch gets what ``Key(its_seed)`` gives its first sample when served alone.

    Args:
        seed: an int of 64 bits, an int64 scalar tensor, or an int64 tensor (batch,) with one seed per sample.
            Tensors may live on any device. The key copies them: for a captured CUDA graph, make the key inside the
            capture from a seed tensor on the device, whose new values then give new noise.

    Under ``torch.compile`` a key is a tensor input: new seeds, streams and sample ids cause no recompilation.

    Raises:
        TypeError: ``seed`` is neither an int nor an int64 tensor.
        ValueError: an int beyond 64 bits, or a tensor of more than one dimension.

    >>> key = Key(7).stream(2).samples(64)
    >>> key
    Key(seed=7, stream=2, samples=64...)
    """

    __slots__ = ("packed",)

    packed: Tensor
    """int64: ``[seed, stream, first sample id]``, or one row ``[seed, stream, sample id]`` per sample."""

    def __init__(self, seed: int | Tensor):
        if isinstance(seed, Tensor):
            _check_int64_tensor("seed", seed, max_dim=1)
            zero = torch.zeros_like(seed)
            packed = torch.stack((seed, zero, zero), dim=-1)
        else:
            number = _wrap_int64("seed", _integer("seed", seed, low=-(1 << 63), high=1 << 64))
            packed = torch.tensor((number, 0, 0), dtype=torch.int64, device="cpu")
        object.__setattr__(self, "packed", packed)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Key is immutable: cannot set {name!r}; use stream(), samples() or fold_in()")

    def __eq__(self, other: object) -> bool:
        """Whether both make the same noise, wherever their words are. It waits for a device that the words are on."""
        if not isinstance(other, Key):
            return NotImplemented
        return self is other or self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[Any, ...]:
        if not has_values(self.packed):
            raise TypeError(
                "key must have values to be compared; on the meta device, in fake tensors and inside vmap it has none"
            )
        words = self.packed.tolist()
        return tuple(map(tuple, words)) if self.per_sample else tuple(words)

    def __copy__(self) -> Key:
        return self

    def __deepcopy__(self, memo: Any) -> Key:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Ints stay what they are wherever they are loaded, and workers of a data loader hand them over without a file.
        is_plain = self.packed.is_cpu and has_values(self.packed)
        return _key_from_words, (self.packed.tolist() if is_plain else self.packed,)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """What stands for a key, as a constant, in a graph of ``torch.fx``."""
        function, args = self.__reduce__()
        return tracer.create_node("call_function", function, tuple(map(tracer.create_arg, args)), {})

    @classmethod
    def from_generator(cls, generator: torch.Generator | None = None) -> Key:
        """A key with 64 bits drawn from ``generator`` (default: torch's own, governed by ``torch.manual_seed``)."""
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        device = "cpu" if generator is None else generator.device
        # One draw and one multiplication: cheap, and both can be compiled.
        words = torch.randint(-(1 << 63), (1 << 63) - 1, (3,), generator=generator, dtype=torch.int64, device=device)
        return _key_from_packed(words * _SEED_ONLY.to(device))

    def stream(self, stream: int | Tensor) -> Key:
        """The same key on another stream, 0 <= ``stream`` < 2^32: independent noise for another purpose.

        The value of an int64 scalar tensor is taken modulo 2^32: looking at it would wait for its device.
        """
        if isinstance(stream, Tensor):
            _check_int64_tensor("stream", stream, max_dim=0)
            stream = stream & _MASK32
        else:
            stream = _integer("stream", stream, low=0, high=1 << 32)
        return self._with(1, stream)

    def samples(self, samples: int | Tensor | Sequence[int] | np.ndarray) -> Key:
        """The same key for other samples: for a shard of a batch, or for requests that share one.

        Args:
            samples: the id of the first sample (an int or an int64 scalar tensor; the batch counts on from it), or
                explicit ids, one per sample (a sequence, a NumPy array or an int64 tensor (batch,)); 0 <= id < 2^63,
                those of a tensor modulo 2^63. A key with one seed per sample takes explicit ids only.

        ``ops.normal((4, 8), key.samples(6))`` is rows 6 to 9 of ``ops.normal((10, 8), key)``.
        """
        if isinstance(samples, np.ndarray) and samples.ndim == 1:
            samples = samples.tolist()
        if isinstance(samples, Sequence) and not isinstance(samples, (str, bytes)):
            ids = [_integer("every id in samples", sample, low=0, high=1 << 63) for sample in samples]
            samples = torch.tensor(ids, dtype=torch.int64, device=self.packed.device)
        if isinstance(samples, Tensor):
            _check_int64_tensor("samples", samples, max_dim=1)
            samples = samples & _MASK63
            if samples.dim() == 1:
                return self._with_ids(samples)
        else:
            samples = _integer("samples", samples, low=0, high=1 << 63)
        if self.per_sample:
            raise ValueError("samples must be one id per sample for a key with one row per sample, got a single id")
        return self._with(2, samples)

    def _with_ids(self, ids: Tensor) -> Key:
        if self.per_sample and len(ids) != len(self.packed):
            raise ValueError(f"samples must hold {len(self.packed)} ids, one per seed, got {len(ids)}")
        head = lifted(self.packed)[..., :2].expand(len(ids), 2)
        return _key_from_packed(torch.cat((head, ids.to(head.device).unsqueeze(1)), dim=1))

    def fold_in(self, n: int | Tensor) -> Key:
        """A new key, independent of this one and of every other ``n``; stream and sample ids stay.

        The new seed is words 0 and 1 of Philox with the counter ``(n mod 2^32, n div 2^32, 0, 2^32 - 1)``.

        Args:
            n: an int of 64 bits or an int64 scalar tensor, such as the training step or the epoch.
        """
        if isinstance(n, Tensor):
            _check_int64_tensor("n", n, max_dim=0)
        else:
            n = _wrap_int64("n", _integer("n", n, low=-(1 << 63), high=1 << 64))
        seed: int | Tensor = lifted(self.packed)[..., 0]
        on_tensors = torch.compiler.is_compiling() or is_traced() or self.per_sample or isinstance(n, Tensor)
        if not (on_tensors or is_wrapped(self.packed)) and self.packed.is_cpu:
            # The same arithmetic on Python ints is quicker than a hundred operations on one-element tensors.
            seed = int(seed)
        low, high, _, _ = _rounds(
            (n & _MASK32, (n >> 32) & _MASK32, 0, _FOLD_TAG, seed & _MASK32, (seed >> 32) & _MASK32)
        )
        folded = low | high << 32
        return self._with(0, _wrap_int64("seed", folded) if isinstance(folded, int) else folded)

    @property
    def per_sample(self) -> bool:
        """Whether the key names each sample of its batch (one seed or one id per sample)."""
        return self.packed.dim() == 2

    def to(self, device: torch.device | str) -> Key:
        """The same key with its words on another device; ops take keys on the CPU or on their own device."""
        return _key_from_packed(lifted(self.packed).to(device))

    def pin_memory(self) -> Key:
        """The same key with its words in pinned memory, as a data loader with ``pin_memory=True`` asks for."""
        return _key_from_packed(self.packed.pin_memory())

    def _with(self, column: int, value: int | Tensor) -> Key:
        packed = lifted(self.packed).clone()
        packed[..., column] = value
        return _key_from_packed(packed)

    def __repr__(self) -> str:
        if not has_values(self.packed):
            return f"Key(words of shape {tuple(self.packed.shape)} without values)"
        seed, stream, sample = self.packed.movedim(-1, 0).tolist()
        if self.per_sample:
            return f"Key(seed={seed}, stream={stream}, samples={sample})"
        return f"Key(seed={seed}, stream={stream}, samples={sample}...)"


def _key_from_packed(packed: Tensor) -> Key:
    key = object.__new__(Key)
    object.__setattr__(key, "packed", packed)
    return key


def _key_from_words(words: Sequence[Any] | Tensor) -> Key:
    """The key of these words, which come from outside: ``[seed, stream, sample id]``, or a row of them per sample."""
    packed = words if isinstance(words, Tensor) else torch.tensor(words, dtype=torch.int64, device="cpu")
    if not isinstance(words, Tensor) and not len(words):
        packed = packed.reshape(0, 3)
    if packed.dtype != torch.int64:
        raise TypeError(f"the words of a key must be of torch.int64, got {packed.dtype}")
    if packed.dim() not in (1, 2) or packed.shape[-1] != 3:
        raise ValueError(
            f"the words of a key must be of shape (3,), or (batch, 3) with a row per sample, got {tuple(packed.shape)}"
        )
    return _key_from_packed(packed)


def _key_from_leaf(packed: Any) -> Key:
    return _key_from_words(packed) if isinstance(packed, Tensor) else _key_from_packed(packed)


def _collate(keys: Sequence[Key], *, collate_fn_map: Any = None) -> Key:
    """One key for a batch of samples that have a key each: every sample gets what it would get alone."""
    rows = [key.packed for key in keys]
    if any(row.shape not in ((3,), (1, 3)) for row in rows):
        sizes = [len(row) for row in rows if row.dim() == 2]
        raise ValueError(f"a sample must have a key of its own to be collated, got one that names {max(sizes)} samples")
    return _key_from_packed(torch.stack([row.reshape(3) for row in rows]))


register_node(Key, "packed", _key_from_leaf)
register_collation(Key, _collate)
register_loading((Key, _key_from_words, _key_from_packed))


# ---------------------------------------------------------------------------------------------------------------------
# The definition, in NumPy.

_f32 = np.float32


def fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """``a * b + c`` in binary32 with one rounding (IEEE-754 fusedMultiplyAdd), for finite values.

    The product of two binary32 numbers is exact in binary64; the sum is rounded to odd by its TwoSum error, which
    makes the second rounding to binary32 the only one (Boldo and Melquiond, 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, dtype=np.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, odd, total).astype(np.float32)


# -2 ln(1 + f) = -2 f + f^2 Q(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; relative error 3.4e-8.
_LOG_Q = (
    0.9999998211860657, -0.6666783690452576, 0.5000360012054443, -0.3992644250392914,
    0.3313974142074585, -0.29812416434288025, 0.2861766219139099, -0.17537200450897217,
)  # fmt: skip
# sin(pi s / 2) = s S(s^2) and cos(pi s / 2) = 1 + s^2 C(s^2) on [-1/2, 1/2]; relative errors 3.3e-9 and 3.9e-8.
_SIN_S = (1.5707963705062866, -0.6459634900093079, 0.07968003302812576, -0.004601658321917057)
_COS_C = (-1.233697772026062, 0.2536035478115082, -0.020418191328644753)
_MINUS_2_LN_2 = -1.3862943649291992
_SQRT_HALF_BITS = 0x3F3504F3


def _horner(x: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = fma(value, x, _f32(coefficient))
    return value


def box_muller(word0: np.ndarray, word1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two standard normals (binary32) from two 32-bit words (uint32 arrays): the definition, operation by operation.

    ``u = (word0 + 1/2) / 2^32`` gives the radius ``r = sqrt(-2 ln u)``, up to 6.76. ``word1`` gives the angle: its
    bit 31 turns it by half a turn, its bit 30 mirrors it at the diagonal, its low 30 bits are a signed fraction ``s``
    of a quarter turn, in [-1/2, 1/2). Nothing depends on a math library: each step is one correctly rounded operation.
    """
    # u in [2^-33, 1]: the conversion keeps full relative precision where u is small, which is the normal's tail.
    u = fma(word0.astype(np.float32), _f32(2.0**-32), _f32(2.0**-33))
    bits = u.view(np.int32)
    exponent = (bits - np.int32(_SQRT_HALF_BITS)) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(np.float32) - _f32(1)
    square = f * f
    tail = fma(square, _horner(f, _LOG_Q), f * _f32(-2))
    radius = np.sqrt(fma(exponent.astype(np.float32), _f32(_MINUS_2_LN_2), tail))
    radius = (radius.view(np.uint32) ^ (word1 & np.uint32(0x80000000))).view(np.float32)

    s = (word1 << np.uint32(2)).view(np.int32).astype(np.float32) * _f32(2.0**-32)
    square = s * s
    sine = s * _horner(square, _SIN_S)
    cosine = fma(square, _horner(square, _COS_C), _f32(1))
    mirrored = (word1 & np.uint32(0x40000000)) != 0
    return radius * np.where(mirrored, sine, cosine), radius * np.where(mirrored, cosine, sine)


def reference_bits(shape: Sequence[int], key: Key) -> np.ndarray:
    """The uint32 words of every element of ``shape`` (first dimension = samples), by the definition above."""
    if len(shape) == 0:
        raise ValueError("shape must have at least one dimension, the samples; got ()")
    batch = shape[0]
    elements = int(np.prod(shape[1:], dtype=np.int64))
    packed = key.packed.cpu().numpy()
    if key.per_sample:
        if len(packed) != batch:
            raise ValueError(f"key must name {batch} samples, one per row of shape, but names {len(packed)}")
        rows = packed
    else:
        rows = np.tile(packed, (batch, 1))
        rows[:, 2] += np.arange(batch)
    seed, stream, sample = (rows[:, i, None].astype(np.uint64) for i in range(3))
    low, shift = np.uint64(_MASK32), np.uint64(32)
    blocks = np.arange((elements + 3) // 4, dtype=np.uint64)[None, :]
    words = philox4x32((blocks, stream, sample & low, sample >> shift), (seed & low, seed >> shift))
    interleaved = np.stack(np.broadcast_arrays(*words), axis=-1).astype(np.uint32)
    return interleaved.reshape(batch, 4 * blocks.size)[:, :elements].reshape(tuple(shape))


def reference_uniform(shape: Sequence[int], key: Key) -> np.ndarray:
    """What :func:`gencore.ops.uniform` draws, float32 in [0, 1), by the definition above."""
    return (reference_bits(shape, key) >> np.uint32(8)).astype(np.float32) * _f32(2.0**-24)


def reference_normal(shape: Sequence[int], key: Key) -> np.ndarray:
    """What :func:`gencore.ops.normal` draws, float32, by the definition above."""
    if len(shape) == 0:
        raise ValueError("shape must have at least one dimension, the samples; got ()")
    elements = int(np.prod(shape[1:], dtype=np.int64))
    padded = (elements + 3) // 4 * 4
    pairs = reference_bits((shape[0], padded), key).reshape(shape[0], padded // 2, 2)
    normals = np.stack(box_muller(pairs[..., 0], pairs[..., 1]), axis=-1)
    return normals.reshape(shape[0], padded)[:, :elements].reshape(tuple(shape))
