"""The definition of the noise: known answers, keys, and what the reference draws."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate

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


# ------------------------------------------------------------------------- keys among PyTorch's own values


def test_keys_compare_by_value():
    key = Key(7).stream(2)
    assert key == Key(7).stream(2)
    assert hash(key) == hash(Key(7).stream(2))
    assert Key(torch.tensor([5, 6])) == Key(torch.tensor([5, 6]))
    assert len({Key(1), Key(1), Key(1).stream(1), Key(1).samples([0])}) == 3
    assert key != Key(7)
    # One sample and a whole batch: another thing, though the words are the same.
    assert Key(7) != Key(7).samples([0])
    assert key != 7


def test_a_key_without_values_is_not_compared():
    key = Key(torch.tensor(3, device="meta"))
    assert repr(key) == "Key(words of shape (3,) without values)"
    with pytest.raises(TypeError, match="key must have values to be compared"):
        assert key == Key(3)
    with pytest.raises(TypeError, match="key must have values to be compared"):
        hash(key)


@pytest.mark.parametrize(
    "key", [Key(-5).stream(2).samples(2**62), Key(torch.tensor([2**63 - 1, -1])), Key(3).samples([])]
)
def test_keys_are_loaded_without_running_code(key):
    file = io.BytesIO()
    torch.save({"keys": [key]}, file)
    for place in ("cpu", "meta"):
        file.seek(0)
        assert torch.load(file, weights_only=True, map_location=place)["keys"] == [key]


def test_what_a_file_says_of_a_key_is_checked():
    for words, message in ((torch.zeros(3), "must be of torch.int64"), ([1, 2], r"must be of shape \(3,\)")):
        with pytest.raises((TypeError, ValueError), match=message):
            noise._key_from_words(words)


def test_keys_are_collated_to_one_for_the_batch():
    keys = [Key(3), Key(5).stream(2), Key(3).samples(9), Key(8).samples([4])]
    (key, nested), numbers = default_collate([((key, {"key": key}), i) for i, key in enumerate(keys)])
    assert key == nested["key"]
    alone = torch.cat([gencore.ops.normal((1, 5), key) for key in keys])
    assert torch.equal(gencore.ops.normal((4, 5), key), alone)
    assert numbers.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="a sample must have a key of its own to be collated, got one that names 2"):
        default_collate([Key(1), Key(torch.tensor([1, 2]))])


def test_workers_of_a_data_loader_hand_keys_over():
    keys = [Key(3).fold_in(i) for i in range(4)]
    batches = list(
        DataLoader([{"key": key} for key in keys], batch_size=2, num_workers=1, multiprocessing_context="fork")
    )
    assert [batch["key"] for batch in batches] == [default_collate(keys[:2]), default_collate(keys[2:])]


def test_vmap_goes_over_the_rows_of_a_key():
    keys = Key(torch.tensor([3, 5])).stream(2)

    def draw(key):
        return gencore.ops.normal((4, 3), key.fold_in(1)), gencore.ops.uniform((2, 4, 3, 1), key, dtype=torch.float64)

    mapped = torch.func.vmap(draw)(keys)
    for i, seed in enumerate((3, 5)):
        for got, want in zip(mapped, draw(Key(seed).stream(2)), strict=True):
            assert torch.equal(got[i], want)
    with_ids = torch.func.vmap(lambda seed: gencore.ops.normal((2, 3), Key(seed).samples([7, 4])))(torch.tensor([3, 5]))
    assert torch.equal(with_ids[1], gencore.ops.normal((2, 3), Key(5).samples([7, 4])))
    assert torch.func.vmap(lambda key: key.stream(4))(keys) == Key(torch.tensor([3, 5])).stream(4)
    with pytest.raises(ValueError, match=r"must be of shape \(3,\), or \(batch, 3\)"):
        torch.func.vmap(lambda key: gencore.ops.normal((4, 3), key))(Key(1))
    with pytest.raises(ValueError, match="out must be mapped over by vmap where the key is"):
        torch.func.vmap(lambda key: gencore.ops.normal((4, 3), key, out=torch.empty(4, 3)))(keys)


def test_vmap_goes_over_seeds_in_other_transforms_and_modes():
    seeds = torch.tensor([[3, 5, 8], [2, 4, 6]])

    def draw(seed):
        return gencore.ops.normal((2, 3), Key(seed))

    nested = torch.func.vmap(torch.func.vmap(draw))(seeds)
    assert torch.equal(nested[1, 2], draw(6))
    assert torch.equal(torch.func.vmap(torch.func.vmap(draw), in_dims=1)(seeds), nested.movedim(1, 0))
    with FakeTensorMode():
        assert torch.func.vmap(draw)(torch.tensor([3, 5])).shape == (2, 2, 3)
    compiled = torch.compile(torch.func.vmap(draw), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(seeds[0]), nested[0])


def test_vmap_keeps_the_memory_format():
    def draw(seed):
        return gencore.ops.normal((2, 3, 4, 5), Key(seed), memory_format=torch.channels_last)

    mapped = torch.func.vmap(draw)(torch.tensor([3, 5]))
    assert mapped[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mapped[1], draw(5))


def test_keys_have_values_in_a_transform_for_gradients():
    def loss(x):
        key = Key(3).stream(1)
        assert key == Key(3).stream(1)
        return (x * gencore.ops.normal((2, 3), key.fold_in(2))).sum()

    want = gencore.ops.normal((2, 3), Key(3).stream(1).fold_in(2))
    assert torch.equal(torch.func.grad(loss)(torch.zeros(2, 3)), want)


def test_a_filled_tensor_is_mapped_with_its_key():
    out, keys = torch.empty(3, 4, 2), Key(torch.tensor([3, 5]))
    torch.func.vmap(lambda key, out: gencore.ops.normal((3, 4), key, out=out), in_dims=(0, 2))(keys, out)
    assert torch.equal(out[..., 1], gencore.ops.normal((3, 4), Key(5)))
    rows = torch.empty(3, 2, 4)  # Samples of one key lie apart from each other.
    torch.func.vmap(lambda key, out: gencore.ops.normal((3, 4), key, out=out), in_dims=(0, 1))(keys, rows)
    assert torch.equal(rows, out.movedim(2, 1))


def test_keys_in_structures_are_moved_with_their_tensors():
    batch = {"key": Key(3).stream(1), "x": torch.zeros(2)}
    assert pytree.tree_map(lambda tensor: tensor.clone(), batch)["key"] == batch["key"]
    assert isinstance(pytree.tree_map(lambda tensor: None, batch)["key"], Key)
    with pytest.raises(TypeError, match=r"the words of a key must be of torch\.int64, got torch\.float16"):
        pytree.tree_map(lambda tensor: tensor.half(), batch)


def test_keys_in_a_mode_of_fake_tensors():
    outside = Key(7)
    with FakeTensorMode():
        for key in (
            outside,
            outside.fold_in(1).stream(2),
            outside.samples([3, 4]),
            Key(3),
            Key(3).fold_in(2).stream(1).samples(4),
            Key(3).samples([1, 2]),
        ):
            assert gencore.ops.normal((2, 3), key).shape == (2, 3)
        assert "without values" in repr(Key(3))


def test_a_key_is_made_on_the_cpu_under_another_default_device():
    with torch.device("meta"):
        key = Key(3).fold_in(2).stream(1).samples([4, 5])
        assert Key.from_generator().packed.is_cpu
    assert key == Key(3).fold_in(2).stream(1).samples([4, 5])


_LAST = 0xFFFFFFFF


@pytest.mark.parametrize(
    "narrow",
    [
        lambda word: np.array([word], np.uint32),
        np.uint32,
        lambda word: torch.tensor(word).to(torch.int32),
        lambda word: torch.tensor(word).to(torch.uint32),
        lambda word: np.array(word, np.int64),
    ],
)
def test_philox_widens_narrow_words(narrow):
    counter, key = (_LAST, 1 << 31, 5, 7), (_LAST - 1, 1 << 31)
    want = noise.philox4x32(counter, key)
    for words in (
        noise.philox4x32(list(map(narrow, counter)), list(map(narrow, key))),
        noise.philox4x32((narrow(_LAST), *counter[1:]), key),
        noise.philox4x32(counter, (narrow(key[0]), key[1])),
    ):
        assert tuple(np.asarray(word).item() for word in words) == want


def test_philox_takes_bytes_of_numpy():
    assert noise.philox4x32((np.uint8(200), np.int16(7), 0, 0), (1, 2)) == noise.philox4x32((200, 7, 0, 0), (1, 2))


@pytest.mark.parametrize("word", [np.uint32(5), np.int64(5), np.array(5), np.array([5], np.uint8)])
def test_philox_of_numpy_is_of_uint64(word):
    want = noise.philox4x32((5, 0, 1 << 31, 0), (1, 5))
    for got, number in zip(noise.philox4x32((word, 0, 1 << 31, 0), (1, word)), want, strict=True):
        assert got.dtype == np.uint64
        assert got.item() == number


def test_keys_take_arrays_of_ids():
    for ids in (np.arange(3), np.array([5, 0, 7], np.uint8), np.array([], np.int32)):
        assert Key(2).samples(ids) == Key(2).samples(ids.tolist())
    assert Key(2).samples(np.array(4)) == Key(2).samples(4)
    for ids in (np.array([1.0]), np.array([True]), np.array([[1, 2]])):
        with pytest.raises(TypeError, match="samples must be an int"):
            Key(2).samples(ids)


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        (-1, ValueError, r"counter\[0\] must be in \[0, 2\^32\), got -1"),
        (1 << 32, ValueError, "got 4294967296"),
        (np.array([3, -1]), ValueError, "got -1 to 3"),
        (True, TypeError, r"counter\[0\] must be an int, an array or a tensor of ints, got bool"),
        (0.5, TypeError, "got float"),
        (np.array([0.5]), TypeError, "must be of integers, got an array of float64"),
        (torch.tensor(0.5), TypeError, "must be of integers, got a tensor of torch.float32"),
    ],
)
def test_philox_says_what_a_word_must_be(word, error, message):
    with pytest.raises(error, match=message):
        noise.philox4x32((word, 0, 0, 0), (0, 0))


def test_philox_refuses_arrays_beside_tensors():
    with pytest.raises(TypeError, match="counter and key must hold NumPy arrays or torch tensors, got both"):
        noise.philox4x32((np.uint64(1), 0, 0, 0), (torch.tensor(1), 0))
