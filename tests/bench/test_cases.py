"""The table of cases holds what it promises."""

from __future__ import annotations

import pytest
import torch

from gencore.bench import cases


@pytest.mark.parametrize("table", [cases.NOISE, cases.REPARAMETERIZE])
def test_every_case_is_one_of_a_kind_and_used(table):
    assert len({(case.shape, case.layout, case.draws) for case in table}) == len(table)
    timed = {case for device in ("cpu", "cuda") for case in cases.timed(table, device)}
    assert set(cases.small(table)) | timed == set(table)


@pytest.mark.parametrize("table", [cases.NOISE, cases.REPARAMETERIZE])
def test_the_tables_have_the_awkward_ones(table):
    shapes = [case.shape for case in cases.small(table)]
    assert any(0 in shape for shape in shapes)
    assert any(case.elements == 1 for case in table)
    assert any(case.elements % 4 for case in table)
    assert {case.layout for case in cases.small(table)} == {"contiguous", "channels_last", "channels_last_3d"}


def test_a_case_makes_its_layout():
    for case in cases.NOISE:
        assert torch.empty(case.shape, device="meta").to(memory_format=case.memory_format).shape == case.shape
