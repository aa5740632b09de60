"""Affine maps: least squares and ridge regression written out, and what they are pulled to."""

import numpy as np
import pytest
import torch

from tvlens.linear_maps import fit_map


def rows(n: int, d_in: int, d_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d_in)) + 3
    return torch.tensor(x), torch.tensor(
        x @ rng.normal(size=(d_in, d_out)) + rng.normal(size=d_out)
    )


@pytest.mark.parametrize(("d_in", "d_out"), [(4, 4), (6, 3), (3, 6)])
def test_with_rows_enough_it_is_least_squares(d_in: int, d_out: int) -> None:
    x, y = rows(60, d_in, d_out)
    y = y + 0.1 * torch.tensor(np.random.default_rng(1).normal(size=y.shape))
    design = np.c_[x.numpy(), np.ones(60)]
    expected = design @ np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit_map(x, y, strength=1e-11)(x).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("towards", ["identity", "mean"])
def test_it_is_ridge_regression_in_the_space_of_dimensions(towards: str) -> None:
    x, y = rows(7, 12, 12)
    a, b = (v.numpy() - v.numpy().mean(axis=0) for v in (x, y))
    penalty = 0.3 * np.square(a).sum(axis=1).mean() * np.eye(12)
    plain = np.eye(12) if towards == "identity" else np.zeros((12, 12))
    expected = plain + np.linalg.solve(a.T @ a + penalty, a.T @ (b - a @ plain))
    found = fit_map(x, y, strength=0.3, towards=towards)
    np.testing.assert_allclose(found.weight.numpy(), expected, atol=1e-9)


def test_pulled_hard_it_does_nothing_or_gives_the_mean() -> None:
    x, y = rows(20, 5, 5)
    shifted = fit_map(x, y, strength=1e12)(x)
    torch.testing.assert_close(shifted, x + (y - x).mean(dim=0), atol=1e-6, rtol=0)
    constant = fit_map(x, y[:, :2], strength=1e12)(x)
    torch.testing.assert_close(constant, y[:, :2].mean(dim=0).expand(20, 2), atol=1e-6, rtol=0)
    same = fit_map(x, x, strength=0.5)
    torch.testing.assert_close(same(x + 1), x + 1)


def test_what_cannot_be_fitted() -> None:
    x, y = rows(9, 4, 3)
    for settings, message in (
        ({"strength": 0.0}, "above 0"),
        ({"strength": 1.0, "towards": "identity"}, "no identity between widths 4 and 3"),
        ({"strength": 1.0, "towards": "means"}, "unknown aim of a map 'means'. Nearest: mean"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_map(x, y, **settings)
    with pytest.raises(ValueError, match="at least 2 rows; 1 arrived"):
        fit_map(x[:1], y[:1], strength=1.0)
