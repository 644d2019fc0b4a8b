"""The scaled Bernoulli law in single precision at its limits, compiled and not."""

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from pyrosc.distributions import ScaledBernoulli, _compiled
from pyrosc.distributions._layout import Layout

LOGITS = (-90.0, -40.0, -12.0, -3.0, -0.1, 0.0, 0.4, 3.0, 11.0, 30.0)
LOG_SCALES = (-30.0, -4.0, -0.69, -0.01, -1e-6, 0.0)


@pytest.fixture(params=["torch", "compiled"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_compiled, "MIN_SIZE", 0 if request.param == "compiled" else 10**12)
    return request.param


def exact(x: int, a: float, s: float) -> tuple[float, float, float]:
    """Log-probability and its slopes in logits and log scale, to 60 digits."""
    with mpmath.workdps(60):
        q, scale = 1 / (1 + mpmath.exp(-mpmath.mpf(a))), mpmath.exp(mpmath.mpf(s))
        p = q * scale
        if x:
            return float(mpmath.log(p)), float(1 - q), 1.0
        return float(mpmath.log(1 - p)), float(-p * (1 - q) / (1 - p)), float(-p / (1 - p))


@pytest.mark.usefixtures("kernel")
def test_value_and_gradient_over_the_whole_range():
    grid = [(x, a, s) for x in (0, 1) for a in LOGITS for s in LOG_SCALES]
    x, a, s = (torch.tensor(column, dtype=torch.float32) for column in zip(*grid, strict=True))
    a.requires_grad_()
    s.requires_grad_()
    value = ScaledBernoulli(a, s).log_prob(x)
    value.sum().backward()
    cells = zip(x, a.detach(), s.detach(), strict=True)
    want = np.array([exact(int(i), float(j), float(k)) for i, j, k in cells])
    for found, expected in zip((value.detach(), a.grad, s.grad), want.T, strict=True):
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=3e-6, atol=1e-30)


@pytest.mark.usefixtures("kernel")
def test_certain_successes_stay_finite():
    a = torch.full((4, 3), 200.0, requires_grad=True)
    value = ScaledBernoulli(a, torch.zeros(3)).to_event(1).log_prob(torch.zeros(4, 3))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(a.grad).all()


def random_case(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    a = torch.as_tensor(rng.normal(-1, 3, (rows, cols)), dtype=torch.float32)
    s = -torch.as_tensor(rng.exponential(1.0, (rows, 1)), dtype=torch.float32).expand(rows, cols)
    return torch.as_tensor(rng.random((rows, cols)) < 0.1).float(), a, s


@pytest.mark.parametrize("event", [0, 1, 2])
@pytest.mark.parametrize("shared", ["none", "logits", "scale"])
def test_the_compiled_kernel_gives_the_same(event: int, shared: str, monkeypatch: pytest.MonkeyPatch):
    x, a, s = random_case(21, 1500)
    a, s = (a[0] if shared == "logits" else a), (s[0] if shared == "scale" else s)
    found = []
    for least in (0, 10**12):
        monkeypatch.setattr(_compiled, "MIN_SIZE", least)
        one, two = a.clone().requires_grad_(), s.clone().requires_grad_()
        value = ScaledBernoulli(one, two).expand(x.shape).to_event(event).log_prob(x)
        (value * torch.linspace(0.5, 2, value.numel()).reshape(value.shape)).sum().backward()
        found.append((value.detach(), one.grad, two.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-4)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("event", [0, 1, 2])
@pytest.mark.parametrize("shape", [(21, 1), (4, 21, 1), (1500,), (), (21, 1500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_in_two_parts_is_their_sum(event: int, shape: tuple[int, ...], dtype: torch.dtype):
    """A part per row is passed to the kernels as it is; others are added before."""
    x, a, s = random_case(21, 1500)
    a = a.to(dtype).expand(*shape[:-2], 21, 1500)
    rng = np.random.default_rng(1)
    depth = torch.as_tensor(rng.normal(-0.5, 1, shape), dtype=dtype)
    found = []
    for apart in (True, False):
        one, two, three = (
            t.clone().requires_grad_() for t in (a, s[:, 0].mean() + 0.1 * s[0].to(dtype), depth)
        )
        law = ScaledBernoulli(one, two, three) if apart else ScaledBernoulli(one, two + three)
        assert law.batch_shape == a.shape
        value = law.to_event(event).log_prob(x.to(dtype))
        (value * torch.linspace(0.5, 2, value.numel(), dtype=dtype).reshape(value.shape)).sum().backward()
        found.append((value.detach(), law.probability.detach(), one.grad, two.grad, three.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_compiled, "SHARE", 500)
    x, a, s = random_case(70, 300, seed=1)
    layout, before, results = Layout.of(1, x.shape, a.shape), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            views = [a, s, s[:, :1].contiguous()]
            out, grads = _compiled.evaluate(x, views, layout, [True, True, True], "scaled_bernoulli")
            results.append([out, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(m, f) for other in results[1:] for m, f in zip(other, results[0], strict=True))


def test_without_a_scale_it_is_the_bernoulli_law():
    a = torch.linspace(-5, 5, 11, dtype=torch.float64)
    x = (torch.arange(11) % 2).double()
    torch.testing.assert_close(
        ScaledBernoulli(a).log_prob(x), torch.distributions.Bernoulli(logits=a).log_prob(x)
    )


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="support"):
        ScaledBernoulli(torch.zeros(2), validate_args=True).log_prob(torch.tensor([0.0, 2.0]))
