import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from gencore import Key, ops
from gencore.metrics import manifold, nearest, nearest_in, neighbours


def normals(n, size, seed, scale=1.0):
    return scale * ops.normal((n, size), Key(seed), dtype=torch.float64)


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "_AT_A_TIME", 100)


@pytest.mark.usefixtures("_small_blocks")
def test_nearest_are_those_of_scikit_learn():
    # Far from 0, where |a|^2 + |b|^2 - 2 a.b of vectors that are not centred has no digit left.
    points, queries = normals(60, 7, 1) + 1e7, normals(35, 7, 2) + 1e7
    distances, indices = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(points - 1e7).kneighbors(queries - 1e7)
    found = nearest(queries, points, 4)
    assert torch.equal(found.indices, torch.from_numpy(indices))
    torch.testing.assert_close(found.distances, torch.from_numpy(distances), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [[60], [2, 57, 1], [1] * 60])
def test_nearest_of_points_in_batches(sizes):
    points, queries = normals(60, 7, 1), normals(35, 7, 2)
    found, expected = nearest_in(queries, points.split(sizes), 4), nearest(queries, points, 4)
    assert torch.equal(found.indices, expected.indices)
    # A batch is centred by its own mean.
    torch.testing.assert_close(found.distances, expected.distances, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="batches must hold at least 4 points, got 3"):
        nearest_in(queries, points[:3].split(2), 4)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(("k", "k_density"), [(3, 5), (1, 2), (6, 1)])
def test_measures_are_those_of_scikit_learn(k, k_density):
    real, fake = normals(50, 3, 1), normals(40, 3, 2, 0.7) + 0.4

    def radii(x, k):
        return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0][:, -1]

    distances = torch.cdist(real, fake).numpy()
    found = manifold(real, fake, k=k, k_density=k_density)
    assert found.precision.tolist() == (distances <= radii(real, k)[:, None]).any(0).tolist()
    assert found.recall.tolist() == (distances <= radii(fake, k)).any(1).tolist()
    within = distances <= radii(real, k_density)[:, None]
    torch.testing.assert_close(found.density, torch.from_numpy(within.sum(0) / k_density))
    assert found.coverage.tolist() == within.any(1).tolist()
    assert 0 < found.recall.mean() < 1


def test_by_hand():
    """On a line, k = 1: the balls of the real images 0, 1, 5 have radii 1, 1, 4; of samples 1.5, 12, 13: 10.5, 1, 1."""
    real, fake = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.5], [12.0], [13.0]])
    found = manifold(real, fake, k=1, k_density=1)
    assert found.precision.tolist() == [1, 0, 0]
    assert found.recall.tolist() == [1, 1, 1]  # 1.5 is an outlier of its set, and its ball reaches 12
    assert found.density.tolist() == [2, 0, 0]  # those of 1 and 5
    assert found.coverage.tolist() == [0, 1, 1]


def test_sets_of_one_distribution_are_like_each_other():
    found = manifold(normals(600, 2, 1), normals(600, 2, 2))
    means = [values.mean().item() for values in (found.precision, found.recall, found.density, found.coverage)]
    # The first paper's balls overlap much at k = 3; a real image is covered with 1 - 2^-k, 0.97 at k = 5.
    assert means[0] > 0.9
    assert means[1] > 0.9
    assert means[2] == pytest.approx(1, abs=0.1)
    assert means[3] == pytest.approx(1 - 2**-5, abs=0.03)


def test_a_collapse_has_precision_and_no_recall():
    real = normals(200, 4, 1)
    found = manifold(real, 0.01 * normals(200, 4, 2))
    assert found.precision.mean() > 0.9
    assert found.recall.mean() < 0.1
    assert found.coverage.mean() < 0.5


def test_refuses():
    real = normals(6, 3, 1)
    with pytest.raises(ValueError, match=r"fake must be of shape \(N, D\) with N at least 6, got \(5, 3\)"):
        manifold(real, real[:5])
    with pytest.raises(ValueError, match="fake must be of the size of real, 3, got 2"):
        manifold(real, real[:, :2])
    with pytest.raises(ValueError, match="k and k_density must be at least 1, got 0 and 5"):
        manifold(real, real, k=0)
    with pytest.raises(ValueError, match=r"points must be of shape \(N, D\) with N at least 7, got \(6, 3\)"):
        nearest(real, real, 7)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        nearest(real, real, 0)
