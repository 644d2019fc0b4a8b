"""Time of log-likelihood plus gradient: the textbook formula under autograd against pyrosc's kernels.

Prints, for the negative binomial with and without zero inflation, one inverse dispersion per gene or one per
gene and cell: the median (and fastest) milliseconds of value + backward, their ratio, and the largest
absolute difference of the gradients. The two are timed in turns, so that a busy machine slows both.

    python benchmarks/likelihood_kernel.py [--cells 128] [--genes 4000] [--threads 2] [--repeats 60]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrosc.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial


def textbook(x: Tensor, log_mean: Tensor, log_disp: Tensor, zi: Tensor | None) -> Tensor:
    """Sum of the log-masses as the formula is usually written down."""
    mean, disp = log_mean.exp(), log_disp.exp()
    log_sum = (disp + mean + 1e-8).log()
    zero = disp * (log_disp - log_sum)
    gammas = torch.lgamma(x + disp) - torch.lgamma(disp) - torch.lgamma(x + 1)
    nb = zero + x * ((mean + 1e-8).log() - log_sum) + gammas
    if zi is None:
        return nb.sum()
    return torch.where(x < 0.5, softplus(zero - zi) - softplus(-zi), nb - zi - softplus(-zi)).sum()


def ours(x: Tensor, log_mean: Tensor, log_disp: Tensor, zi: Tensor | None) -> Tensor:
    """The same through the laws."""
    names = {"log_mean": log_mean, "log_inverse_dispersion": log_disp, "validate_args": False}
    law = NegativeBinomial(**names) if zi is None else ZeroInflatedNegativeBinomial(zi_logits=zi, **names)
    return law.to_event(1).log_prob(x).sum()


def counts(cells: int, genes: int) -> tuple[Tensor, Tensor]:
    """Counts of which about 90 % are zeros, and their log means: genes differ widely, cells somewhat."""
    gene = torch.randn(genes) * 1.5 - 3.0
    log_mean = gene + torch.randn(cells, genes) * 0.4
    disp = torch.randn(genes).mul(0.7).exp().expand(cells, genes)
    rate = torch._standard_gamma(disp.contiguous()) / disp * log_mean.exp()
    return torch.poisson(rate), log_mean


def measure(functions: list[Callable[[], Tensor]], params: list[Tensor], repeats: int) -> list[list[float]]:
    """Milliseconds of value and gradient of each function, taken in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 5):
        for taken, function in zip(times, functions, strict=True):
            for param in params:
                param.grad = None
            start = time.perf_counter()
            function().backward()
            if repeat >= 5:
                taken.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--genes", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x, log_mean = counts(args.cells, args.genes)
    zeros = float((x == 0).float().mean())
    print(f"{args.cells} x {args.genes}, {zeros:.0%} zeros, {args.threads} threads: median (fastest) ms")
    print(f"{'law':6}{'dispersion':12}{'textbook':>18}{'pyrosc':>18}{'ratio':>8}{'max difference':>16}")
    for law in ("nb", "zinb"):
        for kind in ("gene", "gene-cell"):
            mean = log_mean.clone().requires_grad_()
            disp = torch.full((args.genes,) if kind == "gene" else x.shape, 0.2).requires_grad_()
            zi = torch.full(x.shape, -1.0).requires_grad_() if law == "zinb" else None
            params = [mean, disp] + ([] if zi is None else [zi])
            functions = [lambda f=f, a=(x, mean, disp, zi): f(*a) for f in (textbook, ours)]
            grads = [torch.autograd.grad(function(), params) for function in functions]
            off = max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True))
            old, new = measure(functions, params, args.repeats)
            medians = [statistics.median(t) for t in (old, new)]
            cells = [f"{m:8.2f} ({min(t):6.2f})" for m, t in zip(medians, (old, new), strict=True)]
            print(f"{law:6}{kind:12}{cells[0]:>18}{cells[1]:>18}{medians[0] / medians[1]:8.1f}{off:16.1e}")


if __name__ == "__main__":
    main()
