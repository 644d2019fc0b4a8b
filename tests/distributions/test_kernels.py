"""The count kernels at their limits: precision, overflow, broadcasting, and the summed form."""

import itertools
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pyrosc.distributions import (
    BetaBinomial,
    NegativeBinomial,
    NegativeBinomialMixture,
    Poisson,
    ZeroInflatedNegativeBinomial,
    _compiled,
)

MEANS = (1e-8, 1e-4, 1e-2, 0.3, 1.0, 7.0, 100.0, 1e3, 1e5, 1e6)
DISPS = (1e-4, 1e-2, 0.3, 1.0, 5.0, 19.0, 25.0, 1e3, 1e5, 1e6)
COUNTS = (0, 1, 2, 3, 4, 5, 15, 16, 17, 50, 1000, 100_000)


def textbook(x: Tensor, a: Tensor, b: Tensor, zi: Tensor | None = None) -> Tensor:
    """The formula as it is usually written, for automatic differentiation in double precision."""
    theta, log_sum = b.exp(), torch.logaddexp(a, b)
    nb = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    nb = nb + theta * (b - log_sum) + x * (a - log_sum)
    if zi is None:
        return nb
    return logsigmoid(zi).where(x == 0, -torch.inf).logaddexp(logsigmoid(-zi) + nb)


def exact_nb(x: float, a: float, b: float) -> tuple[float, float, float]:
    """Log-mass and its derivatives in log mean and log inverse dispersion, to 40 digits."""
    with mpmath.workdps(40):
        x, a, b = mpmath.mpf(x), mpmath.mpf(a), mpmath.mpf(b)
        mu, theta = mpmath.exp(a), mpmath.exp(b)
        log_sum = mpmath.log(mu + theta)
        value = mpmath.loggamma(theta + x) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        value += theta * (b - log_sum) + x * (a - log_sum)
        slope = mpmath.digamma(theta + x) - mpmath.digamma(theta) + b - log_sum + 1
        slope -= (theta + x) / (theta + mu)
        return float(value), float(theta * (x - mu) / (theta + mu)), float(theta * slope)


@pytest.fixture(params=["torch", "compiled"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to work out the negative binomial in single precision, at any size."""
    monkeypatch.setattr(_compiled, "MIN_SIZE", 0 if request.param == "compiled" else 10**12)
    return request.param


@pytest.fixture(scope="module")
def extremes() -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Single-precision inputs over the whole range, and the exact results for those very inputs."""
    grid = np.array(list(itertools.product(COUNTS, MEANS, DISPS)))
    x = torch.tensor(grid[:, 0], dtype=torch.float32)
    a, b = (torch.tensor(np.log(grid[:, i]), dtype=torch.float32) for i in (1, 2))
    exact = np.array([exact_nb(*args) for args in zip(x.tolist(), a.tolist(), b.tolist(), strict=True)])
    return x, a, b, exact


def check_extremes(result: list[Tensor], exact: np.ndarray, x: Tensor, a: Tensor, b: Tensor) -> None:
    """Value to 5e-6 relative; gradients to 1e-5 of their size or of the terms they are a difference of.

    The gradient in log mean is (x - mean) theta/(theta + mean). That in log inverse dispersion scatters over
    counts like min(1, mean/theta), the scale below which it does not matter.
    """
    value, grad_mean, grad_disp = (r.detach().double().numpy() for r in result)
    np.testing.assert_allclose(value, exact[:, 0], rtol=5e-6, atol=1e-30)
    mu, theta, count = (t.detach().double().numpy() for t in (a.exp(), b.exp(), x))
    scale = (count + mu) * theta / (theta + mu)
    assert (np.abs(grad_mean - exact[:, 1]) < 1e-6 * (np.abs(exact[:, 1]) + scale)).all()
    error = np.abs(grad_disp - exact[:, 2]) / (np.abs(exact[:, 2]) + np.minimum(1, mu / theta))
    assert error.max() < 1e-5


@pytest.mark.usefixtures("kernel")
def test_negative_binomial_over_the_whole_range(extremes: tuple[Tensor, Tensor, Tensor, np.ndarray]) -> None:
    x, a, b, exact = extremes
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = NegativeBinomial(log_mean=a, log_inverse_dispersion=b).log_prob(x)
    value.sum().backward()
    check_extremes([value, a.grad, b.grad], exact, x, a, b)


@pytest.mark.usefixtures("kernel")
def test_negative_binomial_with_gene_dispersion_over_the_whole_range(
    extremes: tuple[Tensor, Tensor, Tensor, np.ndarray],
) -> None:
    """As before, with the dispersion a vector shared by the rows, and its gradient therefore a sum."""
    x, a, b, exact = (t.reshape(-1, len(DISPS)) if t.ndim == 1 else t for t in extremes)
    a, row = a.clone().requires_grad_(), b[0].clone().requires_grad_()
    law = NegativeBinomial(log_mean=a, log_inverse_dispersion=row)
    value = law.log_prob(x)
    value.sum().backward()
    pick = exact.reshape(*x.shape, 3)
    np.testing.assert_allclose(value.detach(), pick[..., 0], rtol=5e-6)
    scale = np.abs(pick[..., 2]) + np.minimum(1, (a - b).exp().detach().numpy())
    assert (np.abs(row.grad.numpy() - pick[..., 2].sum(0)) < 1e-5 * scale.sum(0)).all()
    a.grad = row.grad = None
    law.to_event(1).log_prob(x).sum().backward()
    assert (np.abs(row.grad.numpy() - pick[..., 2].sum(0)) < 1e-5 * scale.sum(0)).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("zi", [-30.0, -5.0, -0.5, 3.0, 12.0])
def test_zero_inflation_over_the_whole_range(
    extremes: tuple[Tensor, Tensor, Tensor, np.ndarray], zi: float
) -> None:
    x, a, b, exact = extremes
    args = [t.clone().requires_grad_() for t in (a, b, torch.full_like(a, zi))]
    law = ZeroInflatedNegativeBinomial(log_mean=args[0], log_inverse_dispersion=args[1], zi_logits=args[2])
    value = law.log_prob(x)
    value.sum().backward()
    # In double precision from the exact negative binomial part.
    nb = torch.tensor(exact[:, 0])
    logits = torch.tensor(zi, dtype=torch.float64)
    own = logsigmoid(-logits) + nb
    zero = (x == 0).numpy()
    want = torch.where(x == 0, torch.logaddexp(logsigmoid(logits), own), own)
    chance = torch.where(x == 0, torch.sigmoid(nb - logits), 1.0).numpy()
    inflated = torch.where(x == 0, torch.sigmoid(logits - nb), 0.0).numpy()
    # Near certainty of a zero the log-mass is tiny; it is known to the rounding of the logits.
    np.testing.assert_allclose(value.detach(), want, rtol=5e-6, atol=1.2e-7 * max(1, abs(zi)))
    mu, theta, count = (t.detach().double().numpy() for t in (a.exp(), b.exp(), x))
    size = chance * (np.abs(exact[:, 1]) + (count + mu) * theta / (theta + mu))
    # exp(log p0 - logits) magnifies the rounding of log p0, in proportion to it
    slack = 1 + np.where(zero, np.minimum(np.abs(exact[:, 0]), 100) * 0.1, 0)
    assert (np.abs(args[0].grad.numpy() - chance * exact[:, 1]) <= 2e-6 * slack * size + 1e-30).all()
    size = chance * (np.abs(exact[:, 2]) + np.minimum(1, mu / theta))
    assert (np.abs(args[1].grad.numpy() - chance * exact[:, 2]) <= 1e-5 * slack * size + 1e-30).all()
    gate = torch.sigmoid(logits).item()
    atol = 3e-7 * slack * max(1, abs(zi)) * (gate + inflated)
    assert (np.abs(args[2].grad.numpy() - (inflated - gate)) <= atol + 1e-30).all()


def test_poisson_over_the_whole_range() -> None:
    grid = np.array(list(itertools.product((*COUNTS, 1_000_000), MEANS)))
    x = torch.tensor(grid[:, 0], dtype=torch.float32)
    a = torch.tensor(np.log(grid[:, 1]), dtype=torch.float32).requires_grad_()
    value = Poisson(log_mean=a).log_prob(x)
    value.sum().backward()
    rate = a.detach().double().exp().numpy()
    np.testing.assert_allclose(value.detach(), stats.poisson.logpmf(grid[:, 0], rate), rtol=2e-6)
    assert (np.abs(a.grad.numpy() - (grid[:, 0] - rate)) <= 1e-6 * (grid[:, 0] + rate)).all()


@pytest.mark.parametrize("total", [1, 4, 16, 17, 500])
def test_beta_binomial_over_a_wide_range(total: int) -> None:
    some = sorted({0, 1, 2, total // 2, total - 1, total} & set(range(total + 1)))
    grid = np.array(list(itertools.product(some, (1e-7, 1e-3, 0.3, 0.6, 0.999), (1e-3, 1.0, 30.0, 1e6))))
    x = torch.tensor(grid[:, 0], dtype=torch.float32)
    m, c = (torch.tensor(grid[:, i], dtype=torch.float32, requires_grad=True) for i in (1, 2))
    value = BetaBinomial(m, c, total).log_prob(x)
    value.sum().backward()
    exact = []
    with mpmath.workdps(40):
        for x_, m_, c_ in zip(x.tolist(), m.tolist(), c.tolist(), strict=True):
            x_, m_, c_ = mpmath.mpf(x_), mpmath.mpf(m_), mpmath.mpf(c_)
            a, b, psi, lg = m_ * c_, (1 - m_) * c_, mpmath.digamma, mpmath.loggamma
            p = lg(total + 1) - lg(x_ + 1) - lg(total - x_ + 1) + lg(a + x_) - lg(a)
            p += lg(b + total - x_) - lg(b) - lg(c_ + total) + lg(c_)
            up, down = psi(a + x_) - psi(a), psi(b + total - x_) - psi(b)
            both = psi(c_ + total) - psi(c_)
            slopes = c_ * (up - down), m_ * up + (1 - m_) * down - both
            exact.append([float(v) for v in (p, *slopes, c_ * (up + down), m_ * up + (1 - m_) * down + both)])
    p, by_mean, by_conc, size_mean, size_conc = np.array(exact).T
    np.testing.assert_allclose(value.detach(), p, rtol=1e-5, atol=2e-6)
    assert (np.abs(m.grad.numpy() - by_mean) <= 2e-6 * size_mean).all()
    assert (np.abs(c.grad.numpy() - by_conc) <= 2e-6 * np.minimum(size_conc, np.abs(by_conc) + 1)).all()


@pytest.mark.usefixtures("kernel")
def test_overflowing_parameters_stay_finite_and_right() -> None:
    """Logits and log ratios beyond the reach of exp in single precision."""
    x = torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 2.0, 0.0])
    a = torch.tensor([7.0, 7.0, 80.0, 80.0, -80.0, 7.0, 5.0, 70.0])
    b = torch.tensor([5.0, 5.0, -30.0, -30.0, 30.0, 7.0, 1.0, -60.0])
    zi = torch.tensor([-100.0, -3000.0, -90.0, -90.0, -90.0, 100.0, 3000.0, -95.0])
    args = [t.clone().requires_grad_() for t in (a, b, zi)]
    wide = [t.double().requires_grad_() for t in (a, b, zi)]
    ours = ZeroInflatedNegativeBinomial(log_mean=args[0], log_inverse_dispersion=args[1], zi_logits=args[2])
    value = ours.log_prob(x)
    value.sum().backward()
    want = textbook(x.double(), *wide)
    want.sum().backward()
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(args, wide, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("kernel")
def test_mean_zero() -> None:
    mean = torch.zeros(3, requires_grad=True)
    x = torch.tensor([0.0, 1.0, 7.0])
    for law in (NegativeBinomial(mean, 2.0), ZeroInflatedNegativeBinomial(mean, 2.0, -1.0), Poisson(mean)):
        value = law.log_prob(x)
        torch.testing.assert_close(value[0], torch.tensor(0.0))
        assert torch.isfinite(value).all()
        assert (value[1:] < -50).all()
        mean.grad = None
        value.sum().backward()
        assert torch.isfinite(mean.grad).all()
        assert mean.grad[0] < 0 < mean.grad[1]
        assert (law.sample(torch.Size([20])) == 0).all()
    mean.grad = None
    NegativeBinomial(mean, 2.0).log_prob(torch.zeros(3)).sum().backward()
    torch.testing.assert_close(mean.grad, torch.full((3,), -1.0))


@pytest.mark.usefixtures("kernel")
def test_fractional_counts_use_the_gamma_function() -> None:
    x = torch.tensor([0.0, 0.25, 1.0, 2.5, 15.999, 16.5, 33.3, 5.0], dtype=torch.float64)
    a = torch.linspace(-1, 3, 8, dtype=torch.float64, requires_grad=True)
    b = torch.linspace(2, -1, 8, dtype=torch.float64, requires_grad=True)
    value = NegativeBinomial(log_mean=a, log_inverse_dispersion=b, validate_args=False).log_prob(x)
    torch.testing.assert_close(value, textbook(x, a, b), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(value.sum(), (a, b))
    torch.testing.assert_close(
        ours, torch.autograd.grad(textbook(x, a, b).sum(), (a, b)), rtol=1e-9, atol=1e-11
    )
    single = NegativeBinomial(log_mean=a.float(), log_inverse_dispersion=b.float(), validate_args=False)
    torch.testing.assert_close(single.log_prob(x.float()).double(), value, rtol=1e-5, atol=1e-5)


SHAPES = {
    "mean": [(6, 5), (5,), (6, 1), (), (2, 6, 5), (2, 1, 5)],
    "disp": [(5,), (6, 5), (1, 5), (6, 1), (), (2, 1, 1)],
    "zi": [None, (6, 5), (5,), (2, 6, 1)],
    "value": [(6, 5), (2, 6, 5), (5,), (6, 1)],
}


@pytest.mark.parametrize("zi_shape", SHAPES["zi"], ids=str)
def test_every_way_to_broadcast(zi_shape: tuple[int, ...] | None) -> None:
    """Value and gradient for all combinations of argument shapes, entry-wise and summed, against autograd."""
    generator = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    for mean_shape, disp_shape, value_shape in itertools.product(
        *(SHAPES[k] for k in ("mean", "disp", "value"))
    ):
        args = [noise(mean_shape), noise(disp_shape)] + ([] if zi_shape is None else [noise(zi_shape)])
        x = torch.poisson(noise(value_shape).detach().mul(2).exp(), generator=generator)
        named = dict(zip(("log_mean", "log_inverse_dispersion", "zi_logits"), args, strict=False))
        law = (NegativeBinomial if zi_shape is None else ZeroInflatedNegativeBinomial)(**named)
        full = textbook(x, *args)
        weight = torch.rand(full.shape, generator=generator, dtype=torch.float64)
        for event in range(min(len(law.batch_shape), full.dim()) + 1):
            want, w = full, weight
            if event:
                want = full.flatten(-event).sum(-1)
                w = weight.flatten(-event)[..., 0]
            found = law.to_event(event).log_prob(x)
            torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
            grads = torch.autograd.grad((found * w).sum(), args)
            wants = torch.autograd.grad((want * w).sum(), args, retain_graph=True)
            torch.testing.assert_close(grads, wants, rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_many_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on how the rows are cut, with non-zeros anywhere, also nowhere."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rows, 30, generator=generator, requires_grad=True)
    b = torch.randn(30, generator=generator, requires_grad=True)
    zi = torch.randn(rows, 30, generator=generator, requires_grad=True)
    x = torch.poisson(a.detach().exp(), generator=generator)
    x[rows // 2 :: 3] = 0
    results = []
    for size in (1, 60, 65, 10**6):
        monkeypatch.setattr("pyrosc.distributions._layout.CHUNK", size)
        monkeypatch.setattr("pyrosc.distributions._compiled.SHARE", size)
        value = (
            ZeroInflatedNegativeBinomial(log_mean=a, log_inverse_dispersion=b, zi_logits=zi)
            .to_event(1)
            .log_prob(x)
        )
        results.append([value, *torch.autograd.grad(value.sum(), (a, b, zi))])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)], ids=str)
def test_no_entries(shape: tuple[int, ...]) -> None:
    a = torch.zeros(shape, requires_grad=True)
    for law in (
        NegativeBinomial(log_mean=a, inverse_dispersion=1.0),
        ZeroInflatedNegativeBinomial(log_mean=a, inverse_dispersion=1.0, zi_logits=a),
        NegativeBinomialMixture(
            log_mean_background=a, log_mean_foreground=a, inverse_dispersion=1.0, mixing_logits=a
        ),
        Poisson(log_mean=a),
        BetaBinomial(a + 0.5, 1.0, 4),
    ):
        for event in (0, 1):
            value = law.to_event(event).log_prob(torch.zeros(shape))
            assert value.shape == shape[: len(shape) - event]
            value.sum().backward()


@pytest.mark.usefixtures("kernel")
def test_backward_twice_gives_the_same() -> None:
    """The saved gradients are not consumed: a retained graph may be walked again with other weights."""
    a = torch.zeros(3, 4, requires_grad=True)
    value = NegativeBinomial(log_mean=a, inverse_dispersion=2.0).to_event(1).log_prob(torch.ones(3, 4) * 2)
    (first,) = torch.autograd.grad(value, a, torch.ones(3), retain_graph=True)
    (second,) = torch.autograd.grad(value, a, 2 * torch.ones(3))
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.usefixtures("kernel")
def test_gradient_only_where_asked() -> None:
    x = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    args = [torch.full((2, 2), v) for v in (0.4, -0.2, 0.1)]
    whole = [arg.clone().requires_grad_() for arg in args]
    law = ZeroInflatedNegativeBinomial

    def score(parts: list[Tensor]) -> Tensor:
        return law(log_mean=parts[0], log_inverse_dispersion=parts[1], zi_logits=parts[2]).log_prob(x).sum()

    score(whole).backward()
    for i in range(3):
        some = [arg.clone().requires_grad_(i == j) for j, arg in enumerate(args)]
        score(some).backward()
        torch.testing.assert_close(some[i].grad, whole[i].grad)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("event", [0, 1])
def test_integer_and_strided_values(event: int) -> None:
    x = torch.tensor([[0, 1, 0], [4, 0, 20]])
    law = NegativeBinomial(mean=torch.ones(3, 2), inverse_dispersion=torch.ones(2)).to_event(event)
    torch.testing.assert_close(law.log_prob(x.T), law.log_prob(x.T.float().contiguous()))
    wide = torch.ones(1, 2).expand(3, 2)
    strided = NegativeBinomial(mean=wide, inverse_dispersion=torch.ones(1).expand(2)).to_event(event)
    torch.testing.assert_close(strided.log_prob(x.T), law.log_prob(x.T))


LIMIT_X = torch.arange(0.0, 60.0, dtype=torch.float64)


def test_large_inverse_dispersion_is_poisson() -> None:
    mean = torch.tensor([[0.1], [1.0], [30.0]], dtype=torch.float64)
    distance = [
        (NegativeBinomial(mean, disp).log_prob(LIMIT_X) - Poisson(mean).log_prob(LIMIT_X)).abs().max()
        for disp in (1e6, 1e8, 1e10)
    ]
    assert distance[0] < 3e-3
    assert distance[1] < 3e-5
    assert distance[2] < 3e-7


def test_zero_inflation_logits_at_the_ends() -> None:
    mean = torch.tensor([[1e-3], [1.0], [30.0]], dtype=torch.float64)
    nb = NegativeBinomial(mean, 2.0).log_prob(LIMIT_X)
    off = ZeroInflatedNegativeBinomial(mean, 2.0, -200.0).log_prob(LIMIT_X)
    torch.testing.assert_close(off, nb, rtol=1e-12, atol=1e-12)
    on = ZeroInflatedNegativeBinomial(mean, 2.0, 200.0).log_prob(LIMIT_X)
    torch.testing.assert_close(on[:, 0], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(on[:, 1:], nb[:, 1:] - 200)


def test_mixing_logits_at_the_ends() -> None:
    """A large mixing logit is the background."""
    for logits, mean in ((200.0, 2.0), (-200.0, 9.0)):
        law = NegativeBinomialMixture(2.0, 9.0, torch.tensor(3.0, dtype=torch.float64), logits)
        torch.testing.assert_close(
            law.log_prob(LIMIT_X), NegativeBinomial(mean, law.inverse_dispersion).log_prob(LIMIT_X)
        )
        background, foreground = law.log_prob_components(LIMIT_X)
        assert ((background > foreground) == (logits > 0)).all()


@pytest.mark.parametrize("total", [4, 60])
def test_large_concentration_is_binomial(total: int) -> None:
    x = torch.arange(total + 1.0, dtype=torch.float64)
    mean = torch.tensor([[0.01], [0.3], [0.9]], dtype=torch.float64)
    law = BetaBinomial(mean, 1e12, total).log_prob(x)
    torch.testing.assert_close(
        law, torch.distributions.Binomial(total, mean).log_prob(x), rtol=1e-7, atol=1e-7
    )


def test_one_trial_is_bernoulli() -> None:
    mean = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
    for conc in (1e-3, 1.0, 1e3):
        law = BetaBinomial(mean, conc, 1)
        torch.testing.assert_close(law.log_prob(torch.ones(3)).exp(), mean)
        torch.testing.assert_close(law.log_prob(torch.zeros(3)).exp(), 1 - mean)


def test_impossible_counts_without_validation() -> None:
    for total in (4, 40):
        m = torch.full((3,), 0.3, requires_grad=True)
        value = BetaBinomial(m, 2.0, total, validate_args=False).log_prob(torch.tensor([0.0, 1.0, total + 1]))
        assert torch.isneginf(value).tolist() == [False, False, True]
        value[:2].sum().backward()
        assert torch.isfinite(m.grad).all()


@pytest.mark.parametrize("disp", [1e-4, 1e-3, 1e-2])
def test_samples_of_tiny_inverse_dispersion(disp: float) -> None:
    """In single precision, where a Gamma variable of this shape underflows: zeros and the heavy tail."""
    mean, size = 100.0, 400_000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = NegativeBinomial(torch.full((size,), mean), disp).sample().numpy()
    assert np.isfinite(draws).all()
    # bins of equal width in the logarithm, as far as counts are drawn at all
    edges = np.r_[-0.5, 0.5, np.round(np.geomspace(2, 1e6, 12)) - 0.5, np.inf]
    law = stats.nbinom(disp, disp / (disp + mean))
    want = np.diff(np.r_[0, law.cdf(edges[1:-1]), 1]) * size
    have = np.histogram(draws, bins=edges)[0]
    keep = np.flatnonzero(want > 5)
    assert len(keep) > 3
    want, have = (np.add.reduceat(counts, keep) for counts in (want, have))
    assert stats.chisquare(have, want).pvalue > 1e-3


def test_sampling_rates_are_cut() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = NegativeBinomial(log_mean=torch.full((100,), 60.0), inverse_dispersion=50.0).sample()
        assert torch.isfinite(draws).all()
        assert draws.max() < 1.1e8
        assert torch.isfinite(Poisson(log_mean=60.0).sample(torch.Size([10]))).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: NegativeBinomial(1.0),
        lambda: NegativeBinomial(inverse_dispersion=1.0),
        lambda: NegativeBinomial(1.0, 1.0, log_mean=0.0),
        lambda: NegativeBinomial(1.0, 1.0, log_inverse_dispersion=0.0),
        lambda: ZeroInflatedNegativeBinomial(zi_logits=0.0),
        lambda: ZeroInflatedNegativeBinomial(1.0, 1.0),
        lambda: NegativeBinomialMixture(1.0, 1.0, 1.0),
        lambda: NegativeBinomialMixture(1.0, 1.0, 1.0, 0.0, log_mean_background=0.0),
        lambda: Poisson(),
        lambda: Poisson(1.0, log_mean=0.0),
    ],
)
def test_each_parameter_is_given_once(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="give"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: NegativeBinomial(torch.tensor([1.0, -1.0]), 1.0, **kw),
        lambda **kw: NegativeBinomial(1.0, torch.tensor([1.0, 0.0]), **kw),
        lambda **kw: NegativeBinomial(1.0, -1.0, **kw),
        lambda **kw: NegativeBinomialMixture(1.0, -1.0, 1.0, 0.0, **kw),
        lambda **kw: ZeroInflatedNegativeBinomial(-1.0, 1.0, 0.0, **kw),
        lambda **kw: BetaBinomial(1.5, 1.0, 4, **kw),
        lambda **kw: BetaBinomial(0.5, 0.0, 4, **kw),
        lambda **kw: BetaBinomial(0.5, 1.0, 4.5, **kw),
        lambda **kw: Poisson(-1.0, **kw),
    ],
)
def test_validation_of_parameters(make: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        make()
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        make(validate_args=True)
    make(validate_args=False)


def test_validation_of_values() -> None:
    x = torch.tensor([1.0, -2.0])
    for made in (
        NegativeBinomial(1.0, 1.0),
        Poisson(1.0).to_event(0),
        NegativeBinomial(torch.ones(2), 1.0).to_event(1),
    ):
        with pytest.raises(ValueError, match="within the support"):
            made.log_prob(x)
    with pytest.raises(ValueError, match="within the support"):
        BetaBinomial(0.5, 1.0, 4).log_prob(torch.tensor(5.0))
    with pytest.raises(ValueError, match="must be a Tensor"):
        NegativeBinomial(1.0, 1.0).log_prob(3)  # type: ignore[arg-type]
    assert torch.isfinite(NegativeBinomial(1.0, 1.0, validate_args=False).log_prob(torch.tensor(0.5)))
    quiet = NegativeBinomial(torch.ones(2), 1.0, validate_args=False)
    assert quiet.expand([3, 2])._validate_args is False
    assert quiet.to_event(1)._validate_args is False


@pytest.mark.gpu
@pytest.mark.parametrize("event", [0, 1])
def test_same_on_a_gpu(event: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 300, generator=generator)
    x = torch.poisson((a * 2).exp(), generator=generator)
    args = [a, torch.randn(300, generator=generator), torch.randn(64, 300, generator=generator)]
    results = []
    for device in ("cpu", "cuda"):
        moved = [arg.to(device).requires_grad_() for arg in args]
        law = ZeroInflatedNegativeBinomial(
            log_mean=moved[0], log_inverse_dispersion=moved[1], zi_logits=moved[2]
        ).to_event(event)
        value = law.log_prob(x.to(device))
        results.append([t.cpu() for t in (value, *torch.autograd.grad(value.sum(), moved))])
        assert law.sample().device.type == device
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_careful_and_quick_forms_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form used after an overflow, and on accelerators, gives what the quick one gives."""
    generator = torch.Generator().manual_seed(2)
    a, zi = (
        torch.randn(9, 20, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    x = torch.poisson(a.detach().exp(), generator=generator)
    for b in (torch.zeros(20, dtype=torch.float64), torch.ones(9, 20, dtype=torch.float64)):
        law = ZeroInflatedNegativeBinomial(
            log_mean=a, log_inverse_dispersion=b.requires_grad_(), zi_logits=zi
        )
        results = []
        for careful in (False, True):
            if careful:
                from pyrosc.distributions import _nb_kernel

                monkeypatch.setattr(_nb_kernel, "_quick", _nb_kernel._careful)
            value = law.log_prob(x)
            results.append([value, *torch.autograd.grad(value.sum(), (a, b, zi))])
        monkeypatch.undo()
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_softplus_reference_is_independent() -> None:
    """The reference formula of this file agrees with SciPy, so that it may judge."""
    x = torch.arange(30.0, dtype=torch.float64)
    a, b = torch.tensor(1.2, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    theta, mu = b.exp().item(), a.exp().item()
    np.testing.assert_allclose(
        textbook(x, a, b), stats.nbinom.logpmf(x, theta, theta / (theta + mu)), rtol=1e-11
    )
    zero = torch.zeros((), dtype=torch.float64)
    zi = torch.tensor(0.7, dtype=torch.float64)
    p0 = textbook(zero, a, b)
    torch.testing.assert_close(textbook(zero, a, b, zi), softplus(p0 - zi) - softplus(-zi))
