"""Pareto smoothed importance sampling against laws of known tail."""

import numpy as np
import pytest
import torch
from scipy.stats import genpareto

from pyrosc.infer.psis import fit_generalized_pareto, khat_threshold, smooth, tail_size


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.2, 0.5, 0.7, 1.0])
def test_shape_and_scale_of_generalised_pareto_laws(k):
    draws = np.sort(genpareto.rvs(k, scale=3.0, size=(1000, 200), random_state=1), axis=0)
    shape, scale = fit_generalized_pareto(torch.as_tensor(draws))
    assert shape.shape == scale.shape == (200,)
    # drawn towards 0.5 with the weight of ten of the thousand observations
    assert shape.mean().item() == pytest.approx((1000 * k + 5) / 1010, abs=0.015)
    assert scale.mean().item() == pytest.approx(3.0, rel=0.02)
    assert 0.01 < shape.std().item() < 0.08  # a maximum likelihood estimate has (1 + k) / √1000


def test_short_tails_are_drawn_towards_one_half():
    draws = torch.as_tensor(np.sort(genpareto.rvs(0.0, size=(20, 4000), random_state=7), axis=0))
    shape = fit_generalized_pareto(draws)[0].mean().item()
    assert shape == pytest.approx(5 / 30, abs=0.05)  # ten observations of 0.5, twenty of about 0


def test_columns_do_not_know_of_each_other():
    draws = torch.as_tensor(np.sort(genpareto.rvs(0.4, size=(50, 7), random_state=2), axis=0))
    together = fit_generalized_pareto(draws)[0]
    alone = torch.stack([fit_generalized_pareto(draws[:, i])[0] for i in range(7)])
    torch.testing.assert_close(together, alone)


def test_khat_of_log_weights_of_known_tail():
    # w = exp(c e) with e exponential has P(w > t) = t^(−1/c): shape c
    noise = torch.as_tensor(np.random.default_rng(3).exponential(size=(4000, 50)))
    for c in (0.2, 0.5, 0.9):
        found = smooth(c * noise + 1000.0)  # the scale of the weights does not matter
        assert found.khat.mean().item() == pytest.approx(c, abs=0.06)
        assert found.log_weights.exp().sum(0).numpy() == pytest.approx(np.ones(50))


def test_smoothing_keeps_order_and_the_body_and_cuts_at_the_largest_weight():
    log_w = torch.as_tensor(np.random.default_rng(4).exponential(size=(500, 3))) * 0.8
    found = smooth(log_w)
    m = tail_size(500)
    order, after = log_w.argsort(0), found.log_weights.argsort(0)
    assert (order[: 500 - m] == after[: 500 - m]).all()
    body = log_w.gather(0, order)[: 500 - m] - found.log_weights.gather(0, order)[: 500 - m]
    torch.testing.assert_close(body, body[:1].expand_as(body))  # one constant per column: the normaliser
    assert (found.log_weights.amax(0) + body[0] <= log_w.amax(0) + 1e-9).all()


def test_log_mean_estimates_the_evidence():
    # E exp(c e) = 1 / (1 − c)
    noise = torch.as_tensor(np.random.default_rng(5).exponential(size=(4000, 100)))
    found = smooth(0.4 * noise)
    assert found.log_mean.exp().mean().item() == pytest.approx(1 / 0.6, rel=0.01)


def test_equal_weights_have_no_tail():
    found = smooth(torch.full((100, 2), 3.0))
    assert (found.khat == -torch.inf).all()
    torch.testing.assert_close(found.log_weights.exp(), torch.full((100, 2), 0.01, dtype=torch.float64))
    torch.testing.assert_close(found.log_mean, torch.full((2,), 3.0, dtype=torch.float64))


def test_one_draw_that_takes_all():
    log_w = torch.zeros(200)
    log_w[17] = 400.0
    found = smooth(log_w)
    assert found.khat > 1
    assert torch.isfinite(found.log_weights).all()


def test_thresholds_and_sizes():
    assert tail_size(100) == 20
    assert tail_size(10_000) == 300
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10**6) == 0.7
    with pytest.raises(ValueError, match="at least 5 of 25"):
        smooth(torch.zeros(20, 3))


def test_agrees_with_arviz():
    psis = pytest.importorskip("arviz", reason="arviz is not installed").psislw
    log_w = np.random.default_rng(6).standard_t(4, size=(400, 20))
    theirs, khat = psis(log_w.T)
    found = smooth(torch.as_tensor(log_w))
    np.testing.assert_allclose(found.khat.numpy(), khat, atol=1e-6)
    np.testing.assert_allclose(found.log_weights.numpy().T, theirs, atol=1e-6)
