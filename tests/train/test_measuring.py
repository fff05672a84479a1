"""Measures of samples on the way: a curve, and no trace in the training."""

from __future__ import annotations

import math

import pytest
import torch
from train.comparing import assert_same, weights

from gencore import data, metrics
from gencore.processes import ALONE, Processes
from gencore.train import TrainingError
from gencore.train.log import read_metrics
from gencore.train.measuring import Measuring

NAMES = [f"measure/{name} (classifier)" for name in ("FD", "KD", "precision", "recall", "density", "coverage", "IS")]


@pytest.fixture(autouse=True)
def _quick_classifier(monkeypatch):
    train_classifier = metrics.train_classifier
    monkeypatch.setattr(
        "gencore.train.measuring.train_classifier",
        lambda train, test, seed: train_classifier(train, test, seed=seed, steps=20),
    )


def curve(run):
    return {r["step"]: r for r in read_metrics(run / "metrics.jsonl") if NAMES[0] in r}


def test_a_curve_and_no_trace(trainer, tmp_path):
    settings = {"steps": 5, "average": {"decay": 0.5}, "log_every": 3}
    trainer(tmp_path / "plain", **settings).fit()
    trainer(tmp_path / "run", measure_every=2, measured_samples=20, **settings).fit()
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "run"))
    found = curve(tmp_path / "run")
    assert list(found) == [2, 4, 5]
    assert all(math.isfinite(record[name]) for record in found.values() for name in NAMES)
    assert found[2]["seconds"] <= found[5]["seconds"]
    # It goes on as one that was never interrupted.
    trainer(tmp_path / "again", measure_every=2, measured_samples=20, **{**settings, "steps": 3}).fit()
    trainer(tmp_path / "again", measure_every=2, measured_samples=20, **settings).fit(resume=True)
    again = curve(tmp_path / "again")
    assert [again[5][name] for name in NAMES] == [found[5][name] for name in NAMES]


def test_figures_are_those_of_the_samples(trainer, tmp_path, monkeypatch):
    train, test = data.load("bars", "train"), data.load("bars", "test")
    made = trainer(tmp_path / "run", steps=1)
    made.begin()
    measuring = Measuring(train, test, 30, 0)
    found = measuring(made.model, ALONE)
    assert list(found) == NAMES
    assert measuring(made.model, ALONE) == found
    classifier = metrics.ClassifierFeatures(metrics.train_classifier(train, test, seed=0, steps=20))
    compared = []

    def spy(extractor, real, fake, *, real_compare=metrics.compare, **options):
        compared.append((real, fake))
        return real_compare(extractor, real, fake, **options)

    monkeypatch.setattr("gencore.train.measuring.compare", spy)
    measuring(made.model, ALONE)
    ((real, fake),) = compared
    expected = classifier(test.batch(torch.arange(len(test))).images)
    assert len(fake) == 30
    # In another order.
    torch.testing.assert_close(real.sort(0).values, expected.sort(0).values)


def test_a_model_that_has_broken_down_has_no_figures(trainer, tmp_path, monkeypatch):
    made = trainer(tmp_path / "run", steps=1)
    made.begin()
    monkeypatch.setattr(type(made.model), "generate", lambda model, draw: torch.full((draw.n, 1, 4, 4), math.nan))
    found = Measuring(data.load("bars", "train"), None, 6, 0)(made.model, ALONE)
    assert list(found) == NAMES
    assert all(map(math.isnan, found.values()))


def test_the_first_process_alone_measures(trainer, tmp_path):
    made = trainer(tmp_path / "run", steps=1)
    made.begin()

    class Second(Processes):
        def gathered(self, values):
            return [values]

    assert Measuring(data.load("bars", "train"), None, 6, 0)(made.model, Second(1, 2)) == {}


def test_images_without_classes_need_weights(monkeypatch):
    monkeypatch.setenv("GENCORE_TOY_NO_LABELS", "1")
    monkeypatch.setattr("gencore.metrics.efficientnet.is_installed", lambda: False)
    with pytest.raises(TrainingError, match=r"measure_every of images without classes needs the weights"):
        Measuring(data.load("bars", "train"), None, 6, 0)
