"""Meters and metrics.jsonl."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gencore.processes import Processes
from gencore.train.log import Meter, MetricsLog, read_metrics

ALONE = Processes()


def add(meter: Meter, step: int, loss: float, norm: float = 1.0) -> None:
    scalars = {"loss": torch.tensor(loss), "gradient_norm": torch.tensor(norm), "kl": torch.tensor(2.0)}
    meter.add(step, scalars, (scalars["loss"] + scalars["gradient_norm"]).isfinite())


def test_means():
    meter = Meter()
    assert meter.means(ALONE) == {}
    add(meter, 1, 1.0)
    add(meter, 2, 4.0)
    assert meter.means(ALONE) == {"loss": 2.5, "gradient_norm": 1.0, "kl": 2.0}
    assert meter.means(ALONE) == {}


def test_metrics_have_the_same_names_at_every_step():
    meter = Meter()
    add(meter, 1, 1.0)
    with pytest.raises(TypeError, match="same names at every step, but were loss, gradient_norm, kl and are loss"):
        meter.add(2, {"loss": torch.tensor(1.0)}, torch.tensor(True))
    meter.means(ALONE)
    meter.add(2, {"loss": torch.tensor(1.0)}, torch.tensor(True))


def test_state_goes_through_json():
    meter, other = Meter(), Meter()
    add(meter, 1, 0.1)
    other.load_state(json.loads(json.dumps(meter.state(ALONE), allow_nan=False)), ALONE)
    add(meter, 2, 0.7)
    add(other, 2, 0.7)
    assert meter.means(ALONE) == other.means(ALONE)


def test_first_bad_step():
    meter = Meter()
    add(meter, 1, 1.0)
    assert meter.first_bad_step() is None
    add(meter, 2, 1.0, math.inf)
    add(meter, 3, math.nan)
    assert meter.first_bad_step() == 2


def test_lines_of_later_steps_and_half_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": math.nan if step == 1 else 0.5})
    log.close()
    with open(path, "a") as file:
        file.write("[" * 100_000 + "\n" + '{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path, 2)
    log.write({"step": 3, "loss": 0.25})
    log.close()
    lines = path.read_text().splitlines()
    assert lines == ['{"step": 1, "loss": null}', '{"step": 2, "loss": 0.5}', '{"step": 3, "loss": 0.25}']


def test_no_file_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
