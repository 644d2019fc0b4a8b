"""Every law against SciPy, its own moments and samples, and finite differences: one table, all laws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import pyro
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from pyrosc.distributions import (
    BetaBinomial,
    NegativeBinomial,
    NegativeBinomialMixture,
    Normal,
    Poisson,
    ScaledBernoulli,
    ZeroInflatedNegativeBinomial,
)

Make = Callable[..., torch.distributions.Distribution]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draws from a fixed seed that leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def nbinom(x: np.ndarray, mean: np.ndarray, disp: np.ndarray) -> np.ndarray:
    return stats.nbinom.logpmf(x, disp, disp / (disp + mean))


def zinb(x: np.ndarray, mean: np.ndarray, disp: np.ndarray, logits: np.ndarray) -> np.ndarray:
    own = special.log_expit(-logits) + nbinom(x, mean, disp)
    return np.where(x == 0, np.logaddexp(special.log_expit(logits), own), own)


def mixture(
    x: np.ndarray, back: np.ndarray, fore: np.ndarray, disp: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    return np.logaddexp(
        special.log_expit(logits) + nbinom(x, back, disp), special.log_expit(-logits) + nbinom(x, fore, disp)
    )


MEANS = (0.01, 0.5, 3.0, 40.0)
DISPS = (0.2, 1.0, 6.0, 300.0)


@dataclass(frozen=True)
class Law:
    """A law, a grid of parameters, and an independent log-mass."""

    make: Make
    grid: list[tuple[float, ...]]
    reference: Callable[..., np.ndarray]
    top: int = 6000  # the mass beyond is negligible over the grid
    free: int | None = None  # how many leading parameters have gradients

    def params(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return list(torch.tensor(self.grid, dtype=dtype).T)


def logs(make: Make, count: int) -> Make:
    """The same law given the logarithms of its first ``count`` parameters."""
    return lambda *args: make(*(arg.log() for arg in args[:count]), *args[count:])


LAWS = {
    "nb": Law(NegativeBinomial, list(product(MEANS, DISPS)), nbinom),
    "nb-log": Law(
        logs(lambda m, d: NegativeBinomial(log_mean=m, log_inverse_dispersion=d), 2),
        list(product(MEANS, DISPS)),
        nbinom,
    ),
    "zinb": Law(ZeroInflatedNegativeBinomial, list(product(MEANS, DISPS, (-6.0, 0.3, 5.0))), zinb),
    "zinb-log": Law(
        logs(
            lambda m, d, z: ZeroInflatedNegativeBinomial(log_mean=m, log_inverse_dispersion=d, zi_logits=z), 2
        ),
        list(product(MEANS, DISPS, (-6.0, 0.3, 5.0))),
        zinb,
    ),
    "mixture": Law(
        NegativeBinomialMixture, list(product((0.5, 4.0), (3.0, 40.0), DISPS, (-2.0, 1.0))), mixture
    ),
    "mixture-log": Law(
        logs(
            lambda b, f, d, m: NegativeBinomialMixture(
                log_mean_background=b, log_mean_foreground=f, log_inverse_dispersion=d, mixing_logits=m
            ),
            3,
        ),
        list(product((0.5, 4.0), (3.0, 40.0), DISPS, (-2.0, 1.0))),
        mixture,
    ),
    "poisson": Law(Poisson, [(m,) for m in MEANS], lambda x, m: stats.poisson.logpmf(x, m)),
    "poisson-log": Law(
        logs(lambda m: Poisson(log_mean=m), 1), [(m,) for m in MEANS], lambda x, m: stats.poisson.logpmf(x, m)
    ),
    "beta-binomial": Law(
        BetaBinomial,
        list(product((0.01, 0.4, 0.9), (0.5, 4.0, 200.0), (1, 4, 16, 30))),
        lambda x, m, c, t: stats.betabinom.logpmf(x, t, m * c, (1 - m) * c),
        top=40,
        free=2,
    ),
    "scaled-bernoulli": Law(
        ScaledBernoulli,
        list(product((-6.0, -1.0, 0.5, 4.0), (-3.0, -0.7, -0.01))),
        lambda x, a, s: stats.bernoulli.logpmf(x, special.expit(a) * np.exp(s)),
        top=1,
    ),
}


@pytest.fixture(params=LAWS, ids=str)
def law(request: pytest.FixtureRequest) -> Law:
    return LAWS[request.param]


def counts(law: Law) -> Tensor:
    """Counts for every parameter of the grid: small and large ones, within the support."""
    some = torch.tensor([0.0, 1.0, 2.0, 3.0, 7.0, 15.0, 16.0, 17.0, 30.0, 700.0], dtype=torch.float64)[
        :, None
    ]
    if law.make is BetaBinomial:
        some = torch.minimum(some, law.params()[2])
    if law.make is ScaledBernoulli:
        some = some.clamp(max=1)
    return some.expand(-1, len(law.grid)).contiguous()


def test_log_mass_is_scipys(law: Law) -> None:
    x = counts(law)
    ours = law.make(*law.params()).log_prob(x).numpy()
    theirs = law.reference(x.numpy(), *(p.numpy() for p in law.params()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-11)


def test_single_precision_agrees_with_double(law: Law) -> None:
    params = [p.float() for p in law.params()]
    x = counts(law)
    ours = law.make(*params).log_prob(x.float())
    assert ours.dtype == torch.float32
    theirs = law.make(*(p.double() for p in params)).log_prob(x)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_mass_sums_to_one(law: Law) -> None:
    x = torch.arange(law.top + 1, dtype=torch.float64)[:, None]
    made = law.make(*law.params()).expand([law.top + 1, len(law.grid)])
    made._validate_args = False  # the grid of counts runs past the totals of the beta-binomial
    total = made.log_prob(x).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-9)


@pytest.mark.parametrize("event", [0, 1], ids=["entries", "summed"])
def test_gradient_is_that_of_finite_differences(law: Law, event: int) -> None:
    x = counts(law)[[0, 1, 4, 7]]
    x[2, ::3] = 0
    free = law.free or len(law.params())
    params = [p.clone().requires_grad_(i < free) for i, p in enumerate(law.params())]
    assert torch.autograd.gradcheck(lambda *args: law.make(*args).to_event(event).log_prob(x), params)


def test_second_derivative_is_refused(law: Law) -> None:
    params = [p.clone().requires_grad_(i == 0) for i, p in enumerate(law.params())]
    value = law.make(*params).log_prob(torch.ones(len(law.grid), dtype=torch.float64)).sum()
    (once,) = torch.autograd.grad(value, params[0], retain_graph=True)
    (grad,) = torch.autograd.grad(value, params[0], create_graph=True)
    assert torch.equal(grad, once)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), params[0])


def test_moments_are_those_of_the_mass(law: Law) -> None:
    x = torch.arange(law.top + 1, dtype=torch.float64)[:, None]
    made = law.make(*law.params())
    wide = made.expand([law.top + 1, len(law.grid)])
    wide._validate_args = False
    mass = wide.log_prob(x).exp()
    mean = (mass * x).sum(0)
    torch.testing.assert_close(made.mean, mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(made.variance, (mass * (x - mean) ** 2).sum(0), rtol=1e-5, atol=1e-9)


def test_samples_have_the_moments(law: Law) -> None:
    made = law.make(*law.params())
    size = 40_000
    with seeded():
        draws = made.sample(torch.Size([size]))
    assert draws.shape == (size, len(law.grid))
    often = made.mean * size > 300  # enough counts for the standard errors to mean something
    assert often.double().mean() > 0.7
    mean, square = draws.mean(0), (draws - made.mean).square()
    error = (made.variance / size).sqrt()
    assert ((mean - made.mean).abs() < 5 * error)[often].all()
    error = square.std(0) / size**0.5
    assert ((square.mean(0) - made.variance).abs() < 6 * error)[often].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_fit(law: Law, dtype: torch.dtype) -> None:
    size = 20_000
    made = law.make(*law.params(dtype))
    with seeded(1):
        draws = made.sample(torch.Size([size])).numpy()
    p_values = []
    for i, params in enumerate(law.grid):
        with np.errstate(divide="ignore"):
            expected = size * np.exp(law.reference(np.arange(law.top + 1), *(np.float64(p) for p in params)))
        # Merge counts, in order, into bins that expect at least 20 draws.
        edges, filled = [0], 0.0
        for x, e in enumerate(expected):
            filled += e
            if filled >= 20:
                edges.append(x + 1)
                filled = 0.0
        if len(edges) < 3:
            continue
        edges[-1] = law.top + 1
        want = np.add.reduceat(expected, edges[:-1])
        have = np.histogram(draws[:, i], bins=edges)[0]
        p_values.append(stats.chisquare(have, want * have.sum() / want.sum()).pvalue)
    assert len(p_values) > 2
    assert min(p_values) > 1e-3 / len(p_values)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_samples_follow_the_seed_and_have_no_gradient(law: Law) -> None:
    made = law.make(*(p.requires_grad_() for p in law.params()))
    assert not made.has_rsample
    draws = []
    for seed in (3, 3, 4):
        with seeded(seed):
            draws.append(made(torch.Size([50])))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not draws[0].requires_grad


def test_expand_and_event_shapes(law: Law) -> None:
    made = law.make(*law.params())
    n = len(law.grid)
    assert made.batch_shape == (n,)
    assert made.event_shape == ()
    wide = made.expand([3, 2, n])
    assert type(wide) is type(made)
    assert wide.batch_shape == wide.mean.shape == wide.variance.shape == (3, 2, n)
    x = counts(law)[:2]
    for ndims, shape in ((0, (3, 2, n)), (1, (3, 2)), (2, (3,)), (3, ())):
        event = wide.to_event(ndims)
        assert event.event_shape == (3, 2, n)[3 - ndims :]
        assert event.batch_shape == event.log_prob(x).shape == shape
        assert event.sample(torch.Size([5])).shape == (5, 3, 2, n)
        torch.testing.assert_close(
            event.log_prob(x),
            wide.log_prob(x).sum(list(range(3 - ndims, 3))) if ndims else made.log_prob(x).expand(3, 2, n),
        )
    assert made.to_event(1).expand([4]).batch_shape == (4,)
    assert made.to_event(1).expand([4]).log_prob(x[0]).shape == (4,)
    assert wide.to_event(1).to_event(1).event_shape == (2, n)
    assert wide.to_event(2).to_event(-1).batch_shape == (3, 2)
    assert wide.to_event(2).to_event(-2).event_shape == ()
    assert wide.to_event().batch_shape == ()
    assert wide.expand_by([7]).batch_shape == (7, 3, 2, n)


def test_value_broadcasts_over_leading_dimensions(law: Law) -> None:
    x = counts(law)
    made = law.make(*law.params())
    torch.testing.assert_close(made.log_prob(x)[2], made.log_prob(x[2]))
    torch.testing.assert_close(made.to_event(1).log_prob(x), made.log_prob(x).sum(-1))


def test_inference_gives_the_same_value(law: Law) -> None:
    x = counts(law)
    free = law.free or len(law.params())
    made = law.make(*(p.requires_grad_(i < free) for i, p in enumerate(law.params())))
    value = made.log_prob(x)
    assert value.requires_grad
    with torch.no_grad():
        quiet = law.make(*law.params()).log_prob(x)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, value.detach(), rtol=1e-14, atol=1e-14)


def test_half_precision_is_computed_in_single(law: Law) -> None:
    params = [p.to(torch.bfloat16) for p in law.params()]
    x = counts(law)[:6].to(torch.bfloat16)
    half = law.make(*params).log_prob(x)
    assert half.dtype == torch.bfloat16
    full = law.make(*(p.float() for p in params)).log_prob(x.float())
    torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bad", [-1.0, 0.5, float("nan"), float("inf")], ids=str)
def test_values_that_are_not_counts_are_refused(law: Law, bad: float) -> None:
    x = counts(law)[0]
    x[-1] = bad
    made = law.make(*law.params())
    for law_ in (made, made.to_event(1)):
        with pytest.raises(ValueError, match="within the support"):
            law_.log_prob(x)


def test_wrong_shapes_are_refused(law: Law) -> None:
    with pytest.raises(ValueError, match="not broadcastable"):
        law.make(*law.params()).log_prob(torch.ones(len(law.grid) + 1))


def test_parameters_that_are_not_numbers_are_refused(law: Law) -> None:
    for i, params in enumerate([law.params()] * len(law.params())):
        params = [p.clone() for p in params]
        params[i][0] = torch.nan
        with pytest.raises(ValueError, match="to satisfy the constraint"):
            law.make(*params)


def test_works_as_a_pyro_site(law: Law) -> None:
    params = law.params()
    x = counts(law)[[0, 1, 2]]
    mask = torch.tensor([True, False, True])

    def model() -> None:
        with pyro.plate("cells", 3), pyro.poutine.scale(scale=2.5), pyro.poutine.mask(mask=mask):
            pyro.sample("x", law.make(*params).to_event(1), obs=x)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    entries = law.make(*params).log_prob(x).sum(-1)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], 2.5 * entries * mask)
    torch.testing.assert_close(trace.nodes["x"]["log_prob_sum"], 2.5 * (entries * mask).sum())


def test_distribution_mask(law: Law) -> None:
    x = counts(law)[:3]
    mask = torch.rand(len(law.grid), generator=torch.Generator().manual_seed(0)) < 0.5
    made = law.make(*law.params())
    torch.testing.assert_close(made.mask(mask).to_event(1).log_prob(x), (made.log_prob(x) * mask).sum(-1))


def test_normal_is_pyros() -> None:
    assert Normal is pyro.distributions.Normal
