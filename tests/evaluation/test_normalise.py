"""Centring and whitening against their definitions."""

import numpy as np
import pytest

from vimpac.errors import InputError
from vimpac.evaluation.normalise import fit_normaliser, unit_length


def correlated(n, dimensions=6, seed=0):
    """Far from the origin, with directions of very different variance, as [CLS] states."""
    rng = np.random.default_rng(seed)
    directions = np.diag(10.0 ** -np.arange(dimensions)) @ rng.normal(size=(dimensions, dimensions))
    return (rng.normal(size=(n, dimensions)) @ directions + 50).astype(np.float32)


def test_none_changes_nothing():
    x = correlated(9)
    assert np.array_equal(fit_normaliser(x, "none")(x), x)


def test_l2_and_vectors_of_zeros():
    x = np.array([[3, 4], [0, 0], [1e-30, 0]], np.float32)
    assert fit_normaliser(x, "l2")(x).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0], [1, 0]]
    assert np.array_equal(unit_length(x), fit_normaliser(x, "l2")(x))


@pytest.mark.parametrize("kind", ["center", "whiten"])
def test_the_mean_is_gone(kind):
    x = correlated(500)
    y = fit_normaliser(x, kind)(x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5 * y.std())  # float32 results of values of this size


def test_center_keeps_differences():
    x = correlated(50)
    y = fit_normaliser(x, "center")(x)
    np.testing.assert_allclose(y - y[0], x - x[0], atol=1e-5)  # 50 in float32 is exact to 4e-6


def test_whitened_directions_vary_equally():
    """Shrinking leaves a little of the covariance: of 100,000 videos, next to nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100_000, 3)) @ np.array([[1, 0.5, 0], [0, 0.3, 0.2], [0, 0, 0.5]])
    y = fit_normaliser(x, "whiten")(x)
    np.testing.assert_allclose(np.cov(y.T), np.eye(3), atol=0.02)
    assert abs(np.cov(x.T) - np.eye(3)).max() > 0.5


def test_whitening_is_no_rotation():
    """The inverse square root of a diagonal covariance is diagonal: each feature is only scaled."""
    x = np.random.default_rng(0).normal(size=(50_000, 3)) * [16, 1, 4]  # not in the order of the eigenvalues
    y = fit_normaliser(x, "whiten")(x)
    correlation = np.corrcoef(x.T, y.T)[:3, 3:]
    np.testing.assert_allclose(correlation, np.eye(3), atol=0.05)  # sampled correlations of 50,000: 1/√n is 0.005


def test_few_videos_stay_apart():
    """Two groups in 64 dimensions, 20 videos: whitened without shrinking, all cosines would be -1/19."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 64))
    x[:10, 0] += 6
    y = unit_length(fit_normaliser(x, "whiten")(x))
    cosines = y @ y.T
    within = cosines[:10, :10][~np.eye(10, dtype=bool)].mean()
    assert within > cosines[:10, 10:].mean() + 0.03


@pytest.mark.parametrize("kind", ["none", "l2", "center", "whiten"])
def test_fitted_on_some_applied_to_others(kind):
    x, others = correlated(50), correlated(7, seed=1)
    fitted = fit_normaliser(x, kind)
    together = fitted(np.concatenate([x, others]))
    assert np.allclose(together[50:], fitted(others), atol=1e-6) and together.dtype == np.float32


def test_videos_that_are_all_alike():
    x = np.ones((5, 3), np.float32)
    assert np.array_equal(fit_normaliser(x, "whiten")(x), np.zeros((5, 3)))


def test_one_video_cannot_be_whitened():
    with pytest.raises(InputError, match="1 video cannot be whitened, expected at least 2"):
        fit_normaliser(np.ones((1, 3), np.float32), "whiten")
    assert fit_normaliser(np.ones((1, 3), np.float32), "center")(np.ones((1, 3))).tolist() == [[0, 0, 0]]
