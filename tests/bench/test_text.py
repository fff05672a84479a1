"""Figures as people read them."""

from __future__ import annotations

import math

import pytest

from gencore.bench import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (math.nan, "–"),
        (1.234, "1.23 s"),
        (123.4, "123 s"),
        (0.9999, "1.00 s"),
        (0.01234, "12.3 ms"),
        (9.996e-6, "10.0 µs"),
        (4.2e-7, "420 ns"),
    ],
)
def test_seconds(value, shown):
    assert text.seconds(value) == shown


def test_ratios_and_shares():
    assert [text.times(value) for value in (None, 0.123, 2.345, 12.34, 99.96, 1234.0)] == [
        "–", "0.12", "2.35", "12.3", "100", "1234",
    ]  # fmt: skip
    assert text.interval((1.0, 2.0)) == "1.00 to 2.00"
    assert [text.share(value) for value in (None, 0.001, 0.5, 1.2)] == ["–", "<1%", "50%", "120%"]


def test_rates_and_sizes():
    assert text.rate(1.3e11, "B/s") == "130 GB/s"
    assert text.rate(0.5, "B/s") == "0.50 B/s"
    assert [text.size(value) for value in (None, 12, 2048, 15 << 20)] == ["–", "12 B", "2.00 KiB", "15.0 MiB"]
    assert text.error(math.inf) == "NaN or infinite"
    assert text.error(1.25e-7) in ("1.2e-07", "1.3e-07")
