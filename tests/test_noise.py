"""The definition of the noise: known answers, keys, and what the reference draws."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gencore
from gencore import Key, noise

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
@pytest.mark.parametrize(
    "kind", [int, np.uint64, lambda word: np.array(word, np.uint64), lambda word: torch.tensor(word)]
)
def test_philox_known_answers(counter, key, words, kind):
    result = noise.philox4x32([kind(word) for word in counter], [kind(word) for word in key])
    assert " ".join(f"{int(word):08x}" for word in result) == words


def test_philox_refuses_other_lengths():
    with pytest.raises(ValueError, match="counter must hold 4 words, got 3"):
        noise.philox4x32((0, 0, 0), (0, 0))
    with pytest.raises(ValueError, match="key must hold 2 words, got 4"):
        noise.philox4x32((0, 0, 0, 0), (0, 0, 0, 0))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 2), st.integers(0, 99))
def test_reference_bits_are_philox_of_the_documented_counter(seed, stream, first, element):
    bits = noise.reference_bits((2, 100), Key(seed).stream(stream).samples(first))
    sample = first + 1
    counter = (element // 4, stream, sample % 2**32, sample // 2**32)
    assert bits[1, element] == noise.philox4x32(counter, (seed % 2**32, seed // 2**32))[element % 4]


# Single-precision numbers of every size, whose products and sums stay finite.
_floats = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True)


@given(_floats, _floats, _floats)
def test_fma_rounds_once(a, b, c):
    from fractions import Fraction

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = noise.fma(np.float32(a), np.float32(b), np.float32(c))
    assert got.dtype == np.float32
    # Nearest: no other binary32 number is closer, and a tie goes to the even one.
    error = abs(Fraction(float(got)) - exact)
    for other in (np.nextafter(got, np.float32(-np.inf)), np.nextafter(got, np.float32(np.inf))):
        distance = abs(Fraction(float(other)) - exact)
        assert error < distance or (error == distance and int(got.view(np.int32)) % 2 == 0)


def test_box_muller_is_accurate_for_its_words():
    words = noise.reference_bits((1, 200_000), Key(11)).reshape(-1, 2)
    a, b = noise.box_muller(words[:, 0], words[:, 1])
    # The uniform is rounded to binary32 before the logarithm, by definition; from there on, float64 is the oracle.
    u = noise.fma(words[:, 0].astype(np.float32), np.float32(2.0**-32), np.float32(2.0**-33)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    turned = np.where(words[:, 1] >> 31, -radius, radius)
    angle = np.pi / 2 * (words[:, 1] << np.uint32(2)).view(np.int32).astype(np.float64) / 2.0**32
    mirrored = (words[:, 1] >> 30) & 1 == 1
    expected = turned * np.cos(angle), turned * np.sin(angle)
    expected = np.where(mirrored, expected[1], expected[0]), np.where(mirrored, expected[0], expected[1])
    for got, want in zip((a, b), expected, strict=True):
        # Two roundings of the radius, two of the angle, one of the product: under 4 ulp.
        assert np.max(np.abs(got - want) / np.maximum(np.abs(want), 1e-30)) < 4 * 2.0**-23


def test_box_muller_extremes():
    words = np.array([0, 0xFFFFFFFF, 0xFFFFFFFF], np.uint32), np.array([0, 0, 0x80000000], np.uint32)
    a, b = noise.box_muller(*words)
    assert a[0] == np.float32(np.sqrt(66 * np.log(2)))
    assert a[0] > 6.5
    assert b[0] == 0
    assert a[1] == 0
    assert np.signbit(a[2])
    assert not np.isnan(a).any()


# ------------------------------------------------------------------------------------------------ keys


def test_key_holds_what_it_is_given():
    assert Key(7).stream(2).samples(64).packed.tolist() == [7, 2, 64]
    assert Key(np.int64(7)).stream(np.uint8(2)).samples(np.int32(64)).packed.tolist() == [7, 2, 64]
    assert Key(2**64 - 1).packed.tolist() == [-1, 0, 0]
    assert Key(torch.tensor([5, 6])).stream(3).packed.tolist() == [[5, 3, 0], [6, 3, 0]]
    assert Key(5).samples([9, 4]).packed.tolist() == [[5, 0, 9], [5, 0, 4]]
    assert Key(torch.tensor([5, 6])).samples(torch.tensor([9, 4])).packed.tolist() == [[5, 0, 9], [6, 0, 4]]
    assert Key(torch.tensor(5)).stream(torch.tensor(1)).samples(torch.tensor(2)).packed.tolist() == [5, 1, 2]


def test_key_is_immutable():
    key = Key(1)
    with pytest.raises(AttributeError, match="immutable"):
        key.packed = torch.zeros(3)
    key.stream(5), key.samples(6), key.fold_in(7)
    assert key.packed.tolist() == [1, 0, 0]


def test_key_does_not_alias_the_seed_tensor():
    seed = torch.tensor(3)
    key = Key(seed)
    seed.add_(1)
    assert key.packed.tolist() == [3, 0, 0]


def test_key_copies_and_pickles():
    key = Key(1).stream(2).samples([3, 4])
    for other in (copy.copy(key), copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert torch.equal(other.packed, key.packed)


def test_key_repr():
    assert repr(Key(7).stream(2).samples(64)) == "Key(seed=7, stream=2, samples=64...)"
    assert repr(Key(torch.tensor([7, 8]))) == "Key(seed=[7, 8], stream=[0, 0], samples=[0, 0])"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Key(1.5), TypeError, "seed must be an int or an int64 tensor, got float"),
        (lambda: Key(True), TypeError, "seed must be an int or an int64 tensor, got bool"),
        (lambda: Key("7"), TypeError, "seed must be an int or an int64 tensor, got str"),
        (lambda: Key(2**64), ValueError, r"seed must be in \[-9223372036854775808, 18446744073709551616\), got"),
        (lambda: Key(torch.tensor(1.0)), TypeError, "seed must be an int or an int64 tensor, got a tensor of"),
        (lambda: Key(torch.zeros(2, 2, dtype=torch.int64)), ValueError, r"seed must be .*, got shape \(2, 2\)"),
        (lambda: Key(0).stream(-1), ValueError, r"stream must be in \[0, 4294967296\), got -1"),
        (lambda: Key(0).stream(2**32), ValueError, r"stream must be in \[0, 4294967296\), got 4294967296"),
        (lambda: Key(0).stream(torch.zeros(2, dtype=torch.int64)), ValueError, "stream must be a scalar"),
        (lambda: Key(0).samples(-1), ValueError, r"samples must be in \[0, 9223372036854775808\), got -1"),
        (lambda: Key(0).samples([1, -1]), ValueError, "every id in samples must be in"),
        (lambda: Key(0).samples("12"), TypeError, "samples must be an int or an int64 tensor, got str"),
        (lambda: Key(torch.tensor([1, 2])).samples(4), ValueError, "samples must be one id per sample"),
        (lambda: Key(torch.tensor([1, 2])).samples([4]), ValueError, "samples must hold 2 ids, one per seed, got 1"),
        (lambda: Key(0).fold_in(0.5), TypeError, "n must be an int or an int64 tensor, got float"),
        (lambda: Key.from_generator(7), TypeError, "generator must be a torch.Generator or None, got int"),
    ],
)
def test_key_says_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


@given(st.integers(-(2**63), 2**64 - 1), st.integers(-(2**63), 2**64 - 1))
def test_fold_in_is_the_documented_philox(seed, n):
    mask = 0xFFFFFFFF
    low, high, _, _ = noise.philox4x32((n & mask, n >> 32 & mask, 0, mask), (seed & mask, seed >> 32 & mask))
    folded = Key(seed).stream(4).samples(5).fold_in(n)
    assert folded.packed[0].item() & (2**64 - 1) == low | high << 32
    assert folded.packed[1:].tolist() == [4, 5]


def test_fold_in_is_the_same_for_ints_tensors_and_seeds_per_sample():
    seeds = [3, -(2**63), 2**63 - 1]
    one_by_one = [Key(seed).fold_in(-9).packed[0].item() for seed in seeds]
    assert Key(torch.tensor(seeds)).fold_in(-9).packed[:, 0].tolist() == one_by_one
    assert Key(torch.tensor(seeds)).fold_in(torch.tensor(-9)).packed[:, 0].tolist() == one_by_one
    assert Key(torch.tensor(seeds[1])).fold_in(torch.tensor(-9)).packed[0].item() == one_by_one[1]


def test_from_generator_follows_manual_seed():
    torch.manual_seed(5)
    first, second = Key.from_generator(), Key.from_generator()
    torch.manual_seed(5)
    assert torch.equal(Key.from_generator().packed, first.packed)
    assert not torch.equal(first.packed, second.packed)
    drawn = [Key.from_generator(torch.Generator().manual_seed(9)).packed for _ in range(2)]
    assert torch.equal(*drawn)


def test_from_generator_uses_all_64_bits():
    torch.manual_seed(0)
    seeds = [Key.from_generator().packed[0].item() & (2**64 - 1) for _ in range(256)]
    for bit in range(64):
        ones = sum(seed >> bit & 1 for seed in seeds)
        # Binomial with n = 256: 6 standard deviations are 48.
        assert 80 < ones < 176, f"bit {bit} was set {ones} times of 256"


def test_reference_refuses_a_key_of_another_batch():
    with pytest.raises(ValueError, match="key must name 3 samples"):
        noise.reference_normal((3, 2), Key(torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="at least one dimension"):
        noise.reference_normal((), Key(1))


def test_key_is_exported():
    assert gencore.Key is Key
