"""Counts of marker genes in cells of several types, where a type raises few genes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyrosc.distributions import NegativeBinomial

Shape = torch.Size | list[int] | tuple[int, ...]

#: Number of centres of the dispersion function.
CENTRES = 10


class Pairs(nn.Module):
    """Which genes mark which types: m pairs of a gene and a type.

    Parameters
    ----------
    genes, types
        Positions of each pair's gene and type, in lists of length m.
    n_genes, n_types
        Sizes.
    """

    genes: Tensor
    types: Tensor
    columns: Tensor
    weights: Tensor

    def __init__(self, genes: list[int], types: list[int], n_genes: int, n_types: int) -> None:
        super().__init__()
        self.n_genes, self.n_types = n_genes, n_types
        marked = torch.zeros(n_genes, n_types)
        marked[genes, types] = 1
        of_pair = nn.functional.one_hot(torch.tensor(types, dtype=torch.long), n_types).float()
        buffers = {
            "genes": torch.tensor(genes, dtype=torch.long),
            "types": torch.tensor(types, dtype=torch.long),
            # the columns that are evaluated: each gene as it is in types that it does not mark, each pair
            "columns": torch.tensor([*range(n_genes), *genes], dtype=torch.long),
            # what a type's log-likelihood is the sum of, (g + m, c)
            "weights": torch.cat([1 - marked, of_pair]),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def __len__(self) -> int:
        return len(self.genes)

    def table(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values of the pairs (m,) as (types, genes)."""
        empty = values.new_full((self.n_types, self.n_genes), fill)
        return empty.index_put((self.types, self.genes), values)


class MarkerCounts(TorchDistribution):
    r"""Negative binomial counts of cells of given types.

    .. math:: x_g \mid z = c \sim \mathrm{NB}(\exp(\eta_g + \delta_{gc}),\ \varphi(\cdot))

    with :math:`\delta_{gc} > 0` for the pairs of gene and type given, and zero for all others. So types have
    most of their terms in common: all genes once and all pairs once are evaluated, not types times genes.

    Parameters
    ----------
    log_mean
        η, (n, g).
    effects
        δ of the pairs, (m,).
    pairs
        Genes and types of the pairs.
    log_inverse_dispersion
        Function of a log mean (n, k) whose columns belong to the genes `columns` (k,).
    kind
        Type of each cell, (..., n) or, with every type along a dim on the left, (c, 1).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(
        self,
        log_mean: Tensor,
        effects: Tensor,
        pairs: Pairs,
        log_inverse_dispersion: Callable[[Tensor, Tensor], Tensor],
        kind: Tensor,
    ) -> None:
        self.log_mean, self.effects, self.pairs = log_mean, effects, pairs
        self.log_inverse_dispersion, self.kind = log_inverse_dispersion, kind
        batch_shape = torch.broadcast_shapes(log_mean.shape[:-1], kind.shape)
        super().__init__(batch_shape, log_mean.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> MarkerCounts:
        """The same law with its batch dimensions broadcast; nothing is copied."""
        shape = torch.Size(batch_shape)
        kind = self.kind.expand(shape) if shape != self.batch_shape else self.kind
        return MarkerCounts(self.log_mean, self.effects, self.pairs, self.log_inverse_dispersion, kind)

    def by_type(self, value: Tensor) -> Tensor:
        """Log-probability of each cell under each type: (n, g) to (n, c)."""
        pairs = self.pairs
        raised = self.log_mean.index_select(-1, pairs.genes) + self.effects
        log_mean = torch.cat([self.log_mean, raised], -1)
        law = NegativeBinomial(
            log_mean=log_mean,
            log_inverse_dispersion=self.log_inverse_dispersion(log_mean, pairs.columns),
            validate_args=False,
        )
        return law.log_prob(value.index_select(-1, pairs.columns)) @ pairs.weights.to(log_mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each cell, of the batch shape."""
        by_type = self.by_type(value)
        cells = torch.arange(by_type.shape[0], device=by_type.device)
        return by_type[cells, self.kind]

    def law(self) -> NegativeBinomial:
        """The law of the counts given the types, with batch shape (..., n, g)."""
        log_mean = self.log_mean + self.pairs.table(self.effects)[self.kind]
        genes = torch.arange(log_mean.shape[-1], device=log_mean.device)
        log_phi = self.log_inverse_dispersion(log_mean, genes)
        return NegativeBinomial(log_mean=log_mean, log_inverse_dispersion=log_phi)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw counts, (..., n, g)."""
        with torch.no_grad():
            return self.law().sample(sample_shape)

    @property
    def mean(self) -> Tensor:
        """Mean counts, (..., n, g)."""
        return self.law().mean

    @property
    def variance(self) -> Tensor:
        """Their variance."""
        return self.law().variance

    def parameters(self) -> dict[str, Tensor]:
        """Mean and inverse dispersion, (..., n, g)."""
        return self.law().parameters()


class MeanDispersion(nn.Module):
    r"""Inverse dispersion as a smooth function of the mean count, the same for all genes.

    .. math:: \varphi(\mu) = \epsilon + \sum_i a_i \exp\left(-\frac{(\mu' - v_i)^2}{2 (v_1 - v_0)^2}\right),
        \qquad \mu' = \min(\mu, v_9)

    with ten centres v from 0 to the largest count. Beyond the last centre the sum would vanish, and the law
    become one of zeros and rare huge counts: a type that raises a gene too much would explain its zeros.

    Parameters
    ----------
    floor
        ε, the least inverse dispersion.
    """

    largest: Tensor

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.log_a = nn.Parameter(torch.zeros(CENTRES))
        self.register_buffer("largest", torch.ones(()))

    def forward(self, log_mean: Tensor, genes: Tensor | None = None) -> Tensor:
        """Log φ of a log mean, any shape."""
        return _LogDispersion.apply(log_mean, self.log_a, self.largest, self.floor)


class _LogDispersion(torch.autograd.Function):
    """With t = μ/(v1 - v0) the sum is exp(-t²/2) times a polynomial in exp(t): one pass for all centres."""

    @staticmethod
    def forward(ctx: Any, log_mean: Tensor, log_a: Tensor, largest: Tensor, floor: float) -> Tensor:
        last = CENTRES - 1
        log_t = log_mean - (largest / last).log()
        inside = log_t < math.log(last)
        t = log_t.clamp_(max=math.log(last)).exp_()
        steps = torch.arange(CENTRES, dtype=log_a.dtype, device=log_a.device)
        weights = (log_a - 0.5 * steps * steps).exp()
        parts = weights.unbind()
        powers, scale = t.exp(), (-0.5 * t * t).exp_()
        total, slope = parts[last].expand_as(t), torch.zeros_like(t)
        for part in reversed(parts[:last]):  # Horner's scheme for value and derivative
            slope = slope.mul_(powers).add_(total)
            total = torch.addcmul(part, total, powers)
        phi = (scale * total).add_(floor)
        slope = slope.mul_(powers).addcmul_(t, total, value=-1).mul_(t).mul_(scale).div_(phi).mul_(inside)
        ctx.save_for_backward(slope, powers, scale.div_(phi), weights)
        return phi.log_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        slope, powers, scale, weights = ctx.saved_tensors
        to_a = None
        if ctx.needs_input_grad[1]:
            share, sums = grad * scale, []
            for i in range(CENTRES):
                sums.append(share.sum())
                if i + 1 < CENTRES:
                    share = share.mul_(powers)
            to_a = torch.stack(sums) * weights
        return grad * slope, to_a, None, None


class GeneDispersion(nn.Module):
    """One inverse dispersion per gene.

    Parameters
    ----------
    n_genes
        Number of genes.
    floor
        The least inverse dispersion.
    """

    def __init__(self, n_genes: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.log_phi = nn.Parameter(torch.zeros(n_genes))

    def forward(self, log_mean: Tensor, genes: Tensor) -> Tensor:
        """Log φ of the genes of the columns, (k,)."""
        return (self.log_phi.exp() + self.floor).log()[genes]
