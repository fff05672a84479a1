import json
import math

import pytest
import torch

from gencore import Key, ops
from gencore.metrics import compare, frechet_distance, inception_score, kernel_distance, manifold, report


class Softmax:
    name, size, fingerprint = "toy", 4, "1"

    def probabilities(self, features):
        return torch.softmax(features, 1)


def normals(n, seed, scale=1.0):
    return scale * ops.normal((n, 4), Key(seed))


def test_every_measure_stands_beside_that_of_real_images():
    real, fake, other = normals(60, 1), normals(40, 2, 1.5), normals(40, 3)
    figures = compare(Softmax(), real, fake, other, replicates=5, key=Key(0))
    assert [(each.name, each.better) for each in figures] == [
        ("FD (toy)", "lower"), ("KD (toy)", "lower"), ("precision (toy)", "higher"), ("recall (toy)", "higher"),
        ("density (toy)", "higher"), ("coverage (toy)", "higher"), ("IS (toy)", "higher"),
    ]  # fmt: skip
    for samples, values in ((fake, [e.estimate.value for e in figures]), (other, [e.real for e in figures])):
        found = manifold(real, samples)
        means = [x.mean().item() for x in (found.precision, found.recall, found.density, found.coverage)]
        distances = [frechet_distance(real, samples), kernel_distance(real, samples).estimate.value]
        score = inception_score(torch.softmax(samples, 1)).value
        assert values == pytest.approx([*distances, *means, score], rel=1e-9)
    assert all(figures[i].estimate.standard_error > 0 for i in (0, 1, 6))
    told = json.loads(json.dumps([each.to_dict() for each in figures]))
    low, high = told[0]["interval"]
    assert low < told[0]["value"] < high
    assert compare(Softmax(), real, fake, other, replicates=5, key=Key(0)) == figures


def test_without_a_bootstrap_and_without_other_images():
    class Plain:
        name, size, fingerprint = "toy", 4, "1"

    figures = compare(Plain(), normals(9, 1), normals(7, 2), replicates=0, key=Key(0))
    assert len(figures) == 6
    assert math.isnan(figures[0].estimate.standard_error)
    assert {each.real for each in figures} == {None}


def test_many_images_are_compared_in_subsets(monkeypatch):
    monkeypatch.setattr(report, "_MOST", 30)
    monkeypatch.setattr(report, "_SUBSET_SIZE", 20)
    found = compare(Softmax(), normals(40, 1), normals(25, 2), replicates=0, key=Key(7))[1].estimate
    expected = kernel_distance(
        normals(40, 1), normals(25, 2), subsets=100, subset_size=20, key=Key(7).fold_in(2)
    ).estimate
    assert found == expected


def test_refuses_few_images():
    with pytest.raises(ValueError, match=r"fake must be of shape \(N, D\) with N at least 6, got \(5, 4\)"):
        compare(Softmax(), normals(9, 1), normals(5, 2), key=Key(0))
