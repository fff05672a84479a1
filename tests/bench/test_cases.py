"""The table of cases holds what it promises."""

from __future__ import annotations

import pytest
import torch

from gencore.bench import cases


@pytest.mark.parametrize("table", [cases.NOISE, cases.REPARAMETERIZE, cases.ATTENTION, cases.SPATIAL_ATTENTION])
def test_every_case_is_one_of_a_kind_and_used(table):
    assert len({str(case) for case in table}) == len(table)
    timed = {case for device in ("cpu", "cuda") for case in cases.timed(table, device)}
    assert set(cases.small(table)) | timed == set(table)


@pytest.mark.parametrize("table", [cases.NOISE, cases.REPARAMETERIZE])
def test_the_tables_have_the_awkward_ones(table):
    shapes = [case.shape for case in cases.small(table)]
    assert any(0 in shape for shape in shapes)
    assert any(case.elements == 1 for case in table)
    assert any(case.elements % 4 for case in table)
    assert {case.layout for case in cases.small(table)} == {"contiguous", "channels_last", "channels_last_3d"}


def test_attention_has_the_awkward_ones():
    small = cases.small(cases.ATTENTION)
    assert {0, 1, 17, 33, 77, 130} <= {case.keys for case in small}
    assert {1, 8, 20, 32, 40, 64, 80, 128, 160, 512} <= {case.size for case in small}
    assert any(case.queries > case.keys > 0 for case in small)
    assert any(case.keys > case.queries > 1 for case in small)
    assert {case.layout for case in small} == {"heads", "tokens"}
    assert {case.layout for case in cases.small(cases.SPATIAL_ATTENTION)} == {"contiguous", "channels_last"}


def test_a_case_makes_its_layout():
    for case in cases.NOISE:
        assert torch.empty(case.shape, device="meta").to(memory_format=case.memory_format).shape == case.shape


def test_a_case_of_attention_makes_its_tensors():
    for case in cases.ATTENTION:
        q, k, v = case.tensors(torch.float32, "meta")
        assert q.shape == (case.batch, case.heads, case.queries, case.size)
        assert k.shape == v.shape == (case.batch, case.heads, case.keys, case.size)
        assert case.layout == "heads" or q.stride(3) == k.stride(3) == 1
        assert q.is_contiguous() or case.layout == "tokens"
    for case in cases.SPATIAL_ATTENTION:
        (image,) = case.tensors(torch.float32, "meta")
        assert image.shape[:2] == (case.batch, 3 * case.heads * case.size)
        assert image.shape[2:].numel() == case.queries == case.keys
        assert image.is_contiguous(memory_format=case.memory_format)


def test_a_generator_makes_the_same_numbers_again():
    for case in cases.small(cases.ATTENTION):
        once, again = (case.tensors(torch.float32, "cpu", torch.Generator().manual_seed(1)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
