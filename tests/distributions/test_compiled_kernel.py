"""The compiled negative binomial kernel: against double precision, and when and how it runs."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrosc.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial, _compiled
from pyrosc.distributions._layout import Layout

TILE = 1024  # columns that the kernel works on at a time


@pytest.fixture(autouse=True)
def _compiled_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled, "MIN_SIZE", 0)


def score(args: list[Tensor], x: Tensor, event: int, weight: Tensor | None = None) -> list[Tensor]:
    """Value and gradients of the law with two or three arguments; double precision is never compiled."""
    args = [arg.detach().requires_grad_() for arg in args]
    named = dict(zip(("log_mean", "log_inverse_dispersion", "zi_logits"), args, strict=False))
    law = NegativeBinomial if len(args) == 2 else ZeroInflatedNegativeBinomial
    value = law(**named, validate_args=False).to_event(event).log_prob(x)
    weight = torch.ones_like(value) if weight is None else weight.to(value.dtype)
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), args)]


def check(args: list[Tensor], x: Tensor, event: int, rtol: float = 1e-5, atol: float = 2e-5) -> None:
    found = score(args, x, event)
    exact = score([arg.double() for arg in args], x.double(), event)
    assert all(t.dtype == torch.float32 for t in found)
    for mine, want in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=rtol, atol=atol)


def random_case(
    rows: int, cols: int, seed: int = 0, shared: bool = True, zi: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Arguments and counts of which most are zero, some large; the dispersion shared by all rows, or not."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mean = noise(rows, cols) * 2 - 1
    disp = noise(cols) if shared else noise(rows, cols)
    x = torch.poisson((mean + noise(rows, cols)).exp(), generator=generator)
    return [mean, disp] + ([noise(rows, cols) * 2] if zi else []), x


@pytest.mark.parametrize("zi", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize("cols", [1, 7, TILE, 2 * TILE + 77])
def test_agrees_with_double_precision(cols: int, event: int, shared: bool, zi: bool) -> None:
    args, x = random_case(9, cols, shared=shared, zi=zi)
    x[3] = 0
    x[5] += 1  # no zeros
    x[6] *= 40
    check(args, x, event)


@pytest.mark.parametrize("kind", ["zeros", "ones", "small", "large", "fractional", "huge"])
def test_rows_of_one_kind(kind: str) -> None:
    """Matrices in which all entries take the same way through the kernel."""
    args, x = random_case(4, 300, seed=1)
    x = {
        "zeros": x * 0,
        "ones": x * 0 + 1,
        "small": x % 15 + 2,
        "large": x + 17,
        "fractional": x + 0.25,
        "huge": x * 1e4 + 3e5,
    }[kind]
    check(args, x, 0)
    check(args, x, 1, atol=1e-3 if kind == "huge" else 2e-5)


SHAPES = {
    "mean": [(6, 5), (5,), (6, 1), (2, 6, 5)],
    "disp": [(5,), (6, 5), (6, 1), (), (2, 1, 5)],
    "zi": [None, (6, 5), (5,), (2, 6, 1)],
    "value": [(6, 5), (2, 6, 5), (5,), (6, 1)],
}


def test_every_way_to_broadcast() -> None:
    generator = torch.Generator().manual_seed(2)
    for mean, disp, zi, value in itertools.product(*SHAPES.values()):
        args = [torch.randn(s, generator=generator) for s in (mean, disp, zi) if s is not None]
        x = torch.poisson(torch.randn(value, generator=generator).exp(), generator=generator)
        shape = torch.broadcast_shapes(value, *(arg.shape for arg in args))
        ndims = len(torch.broadcast_shapes(*(arg.shape for arg in args)))
        for event in range(ndims + 1):
            weight = torch.rand(shape[: len(shape) - event], generator=generator)
            found = score(args, x, event, weight)
            want = score([arg.double() for arg in args], x.double(), event, weight)
            for mine, exact in zip(found, want, strict=True):
                torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=5e-5)


def test_strided_inputs() -> None:
    args, x = random_case(20, 30, seed=3, shared=False)
    want = score(args, x, 1)
    strided = [torch.stack([arg, arg + 1], -1)[..., 0] for arg in args]
    assert not strided[0].is_contiguous()
    for counts in (x.T.contiguous().T, x.double(), x.long(), torch.stack([x, x], -1)[..., 1]):
        for mine, exact in zip(score(strided, counts, 1), want, strict=True):
            torch.testing.assert_close(mine, exact, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_only_where_asked(wanted: tuple[bool, ...]) -> None:
    args, x = random_case(5, 40, seed=4)
    whole = score(args, x, 1)
    some = [arg.clone().requires_grad_(want) for arg, want in zip(args, wanted, strict=True)]
    law = ZeroInflatedNegativeBinomial(
        log_mean=some[0], log_inverse_dispersion=some[1], zi_logits=some[2]
    ).to_event(1)
    value = law.log_prob(x)
    torch.testing.assert_close(value, whole[0], rtol=0, atol=0)
    assert value.requires_grad == any(wanted)
    if any(wanted):
        value.sum().backward()
    for arg, grad, want in zip(some, whole[1:], wanted, strict=True):
        if want:
            torch.testing.assert_close(arg.grad, grad, rtol=0, atol=0)
        else:
            assert arg.grad is None


def test_weights_of_rows_and_kept_graphs() -> None:
    args, x = random_case(8, 50, seed=5)
    args = [arg.requires_grad_() for arg in args]
    law = ZeroInflatedNegativeBinomial(log_mean=args[0], log_inverse_dispersion=args[1], zi_logits=args[2])
    value = law.to_event(1).log_prob(x)
    weight = torch.linspace(-1, 2, 8)
    first = torch.autograd.grad(value, args, weight, retain_graph=True)
    second = torch.autograd.grad(value, args, 2 * weight)
    exact = score([arg.double() for arg in args], x.double(), 1, weight)[1:]
    for a, b, want in zip(first, second, exact, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=0, atol=0)
        torch.testing.assert_close(a.double(), want, rtol=1e-5, atol=2e-5)


def test_a_bad_entry_spoils_only_its_row() -> None:
    args, x = random_case(4, 30, seed=6)
    want = score(args, x, 1)[0]
    for bad in (float("nan"), float("inf"), -float("inf")):
        for arg in (args[0], args[2]):
            keep = arg[1, 2].clone()
            arg[1, 2] = bad
            found = score(args, x, 1)[0]
            arg[1, 2] = keep
            torch.testing.assert_close(found[[0, 2, 3]], want[[0, 2, 3]], rtol=0, atol=0)
            assert not np.isnan(bad) or found[1].isnan()
    x[1, 2] = float("nan")
    found = score(args, x, 1)[0]
    assert found.isnan().tolist() == [False, True, False, False]


def test_logits_without_end() -> None:
    """Infinite logits switch zero inflation off, or make a zero certain."""
    args, x = random_case(3, 40, seed=7)
    off = score([*args[:2], torch.full_like(args[2], -torch.inf)], x, 1)
    plain = score(args[:2], x, 1)
    for mine, want in zip(off[:3], plain, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-5)
    assert off[3].abs().max() < 1e-30
    value, *grads = score([*args[:2], torch.full_like(args[2], torch.inf)], x * 0, 1)
    assert (value == 0).all()
    assert all(grad.abs().max() < 1e-30 for grad in grads)


# --- threads ------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("runtime", ["openmp", "own"])
def test_same_bits_for_any_number_of_threads(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime == "own":
        monkeypatch.setattr(_compiled, "_parallel", lambda: None)
    elif _compiled._parallel() is None:
        pytest.skip("needs an OpenMP runtime with the interface of GCC's, shared with torch")
    monkeypatch.setattr(_compiled, "SHARE", 500)
    args, x = random_case(70, 300, seed=8)
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(_evaluate(args, x))
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert torch.equal(mine, first)


def _evaluate(args: list[Tensor], x: Tensor) -> list[Tensor]:
    layout = Layout.of(1, x.shape, args[0].shape)
    out, grads = _compiled.evaluate(x, args, layout, [True] * len(args))
    return [out, *(grad for grad in grads if grad is not None)]


# --- when it runs -------------------------------------------------------------------------------------------


def used(monkeypatch: pytest.MonkeyPatch, args: list[Tensor], x: Tensor) -> bool:
    """Whether the compiled kernel evaluates this."""
    calls: list[Any] = []
    evaluate = _compiled.evaluate
    monkeypatch.setattr(_compiled, "evaluate", lambda *a: calls.append(a) or evaluate(*a))
    score(args, x, 1)
    monkeypatch.setattr(_compiled, "evaluate", evaluate)
    return bool(calls)


def test_only_large_matrices_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    args, x = random_case(10, 50, seed=9)
    assert used(monkeypatch, args, x)
    assert used(monkeypatch, args[:2], x.double())
    assert not used(monkeypatch, [arg.double() for arg in args], x)
    assert not used(monkeypatch, [args[0], args[1].double()], x)
    assert used(monkeypatch, [arg.half() for arg in args], x)  # computed in single precision
    monkeypatch.setattr(_compiled, "MIN_SIZE", 501)
    assert not used(monkeypatch, args, x)
    monkeypatch.setattr(_compiled, "MIN_SIZE", 500)
    assert used(monkeypatch, args, x)


@pytest.fixture
def fresh() -> Iterator[None]:
    _compiled._kernel.cache_clear()
    yield
    _compiled._kernel.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_numba_the_other_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    args, x = random_case(10, 50, seed=10)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.warns(RuntimeWarning, match="slower than they could"):
        assert not used(monkeypatch, args, x)
    assert not used(monkeypatch, args, x)  # warns once
    check(args, x, 1)


@pytest.mark.usefixtures("fresh")
def test_compilation_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    args, x = random_case(10, 50, seed=11)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert not used(monkeypatch, args, x)


def test_compiles_without_a_folder_to_cache_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyrosc.distributions import _nb_compiled

    asked = []

    def cfunc(signature: Any, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(_nb_compiled.numba, "cfunc", cfunc)
    assert _nb_compiled.build() is _nb_compiled._run
    assert asked == [True, False]


def test_numba_is_imported_by_large_evaluations_only() -> None:
    code = """
import sys, torch, pyrosc
from pyrosc.distributions import NegativeBinomial
assert not {"numba", "scanpy"} & set(sys.modules), "by import"
NegativeBinomial(torch.ones(100, 50), 1.0).log_prob(torch.ones(100, 50))
assert "numba" not in sys.modules, "by a small matrix"
NegativeBinomial(torch.ones(300, 1000), 1.0).log_prob(torch.ones(300, 1000))
assert "numba" in sys.modules
assert "scanpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], check=True, timeout=300)
