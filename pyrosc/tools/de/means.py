"""Draws of the groups' mean expression, in one pass over the cells."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrosc.data.inputs import apply_do, encode_do
from pyrosc.infer.draws import draws_of
from pyrosc.infer.modes import evaluating
from pyrosc.infer.posterior import SharedDraws

if TYPE_CHECKING:
    from pyrosc.data import Dataset
    from pyrosc.models.base import Model

#: Values of a site held at once in a minibatch, and of group means at once in a block of genes.
_BATCH, _BLOCK = 2**23, 2**24
#: Bytes of group means kept in memory; above, they are in a temporary file.
_IN_MEMORY = 2**29
#: Counts, in agreement with the model, that the ratio of observed to expected counts starts from. With half a
#: count (Jeffreys' prior) draws of a group without counts reach down so far that nothing is sure about it.
PRIOR_COUNTS = 1.0
_LARGEST_BATCH = 512
_TINY = np.float32(1e-30)


@dataclass(frozen=True)
class Pass:
    """What a pass over the cells computes.

    Attributes
    ----------
    expression
        Site of expression per cell and gene.
    field
        Field of the counts behind it.
    counts
        Their observed site; None where group means are those of the model alone.
    n_samples
        Draws K from the posterior.
    n_bootstrap
        Bootstrap weights per draw, B.
    mask
        Field that says which of them were measured, so that a feature's means are of the cells in which it
        was; None where all were.
    worlds
        What-if values, over which expression is averaged; none: as the cells are.
    shares
        (worlds, g) weights of the average over them, by feature; None for equal ones.
    resample
        Whether draws are taken again by importance.
    seed
        Of draws and weights.
    """

    expression: str
    field: str
    counts: str | None
    n_samples: int
    n_bootstrap: int
    mask: str | None = None
    worlds: tuple[Mapping[str, Any], ...] = ()
    shares: Tensor | None = None
    resample: bool = False
    seed: int = 0

    @property
    def n_draws(self) -> int:
        """Draws of a group mean."""
        return self.n_samples * self.n_bootstrap


class Store:
    """Arrays (r, g) of several units, written one by one and read by blocks of genes.

    Parameters
    ----------
    n_units, n_rows, n_genes
        Shape of what is stored, float32.
    """

    def __init__(self, n_units: int, n_rows: int, n_genes: int) -> None:
        self.shape = (n_units, n_rows, n_genes)
        width = max(1, min(n_genes, _BLOCK // max(n_units * n_rows, 1)))
        self.blocks = [slice(i, min(i + width, n_genes)) for i in range(0, n_genes, width)]
        self._file: IO[bytes] | None = None
        self._arrays: list[np.ndarray] = []
        if 4 * n_units * n_rows * n_genes > _IN_MEMORY:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        else:
            self._arrays = [np.zeros((n_units, n_rows, b.stop - b.start), np.float32) for b in self.blocks]

    def put(self, unit: int, value: np.ndarray) -> None:
        """Write the (r, g) values of a unit."""
        for i, block in enumerate(self.blocks):
            part = value[:, block]
            if self._file is None:
                self._arrays[i][unit] = part
            else:
                self._file.seek(self._offset(i) + 4 * unit * part.size)
                self._file.write(np.ascontiguousarray(part, np.float32).tobytes())

    def read(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks of genes, as (genes, (units, r, genes of the block))."""
        for i, block in enumerate(self.blocks):
            if self._file is None:
                yield block, self._arrays[i]
            else:
                shape = (*self.shape[:2], block.stop - block.start)
                self._file.seek(self._offset(i))
                data = np.frombuffer(self._file.read(4 * int(np.prod(shape))), np.float32)
                yield block, data.reshape(shape)

    def _offset(self, block: int) -> int:
        return 4 * self.shape[0] * self.shape[1] * self.blocks[block].start

    def close(self) -> None:
        """Remove the file, if there is one."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Sums:
    """Weighted sums over the cells of a unit.

    Attributes
    ----------
    expression, expected
        (rows, g); `expected` is None without counts.
    observed
        (rows, g) or (1, g) counts, or None.
    weight
        (rows, 1) sums of the weights; (rows, g) where not all features were measured in all cells.
    """

    expression: np.ndarray
    expected: np.ndarray | None
    observed: np.ndarray | None
    weight: np.ndarray


def sample_rows(rows: np.ndarray, most: int | None, rng: np.random.Generator) -> np.ndarray:
    """At most `most` of the rows, sorted."""
    if most is None or len(rows) <= most:
        return rows
    return np.sort(rng.choice(rows, most, replace=False))


def unit_sums(
    model: Model, dataset: Dataset, units: Sequence[np.ndarray], plan: Pass, bootstrap: bool
) -> Iterator[Sums]:
    """Sums over the cells of each unit, for every draw.

    Each minibatch lies within one unit. With `bootstrap` each cell has B weights of the exponential law for
    each draw (Rubin 1981's Bayesian bootstrap, before normalisation), so that units add up to larger groups;
    without, cells weigh one and rows are the K draws.

    Parameters
    ----------
    model, dataset
        Model and cells.
    units
        Rows of each unit.
    plan
        What to compute.
    bootstrap
        Whether cells are weighted.

    Yields
    ------
    Sums
        Of each unit, in their order.
    """
    genes = model.registry.n_vars(plan.field)
    size = int(np.clip(_BATCH // (plan.n_samples * genes), 4, _LARGEST_BATCH))
    rng = np.random.default_rng([plan.seed, 1])
    shared = SharedDraws()
    with evaluating(model):
        for rows in units:
            # one generator per unit, so that nothing outside sees a seeded state between yields
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(int(rng.integers(2**31)))
                found = _one_unit(model, dataset, rows, plan, size, shared, rng if bootstrap else None)
            yield found


def _one_unit(
    model: Model,
    dataset: Dataset,
    rows: np.ndarray,
    plan: Pass,
    size: int,
    shared: SharedDraws,
    rng: np.random.Generator | None,
) -> Sums:
    k = plan.n_samples
    s = plan.n_draws if rng is not None else k
    worlds = [encode_do(model.registry, world, len(rows)) for world in plan.worlds]
    totals: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        if name in totals:
            totals[name] += value
        else:
            totals[name] = value

    for at, batch in model.batches(dataset, rows, size):
        b = len(at)
        expression, expected, x = draws_of(
            model,
            plan.expression,
            batch,
            b,
            k,
            shared,
            worlds=[apply_do(batch, world, at) for world in worlds],
            shares=plan.shares,
            expected=plan.counts,
            resample=plan.resample,
        )
        seen = expression.new_ones(b, 1)
        if plan.mask is not None:
            seen = batch[plan.mask].to(expression)
            expression = expression * seen
            expected = None if expected is None else expected * seen
        if rng is None:
            add("expression", expression.sum(1))
            add("weight", seen.sum(0).expand(s, -1).clone())
        else:
            drawn = rng.standard_exponential((s, b), np.float32)
            w = torch.from_numpy(drawn).to(expression.device)
            by_draw = w.reshape(k, plan.n_bootstrap, b)
            add("weight", w @ seen)
            add("expression", (by_draw @ expression).reshape(s, -1))
        if expected is not None:
            assert x is not None
            if rng is None:
                add("expected", expected.sum(1))
                add("observed", x.sum(0, keepdim=True))
            else:
                add("expected", (by_draw @ expected).reshape(s, -1))
                add("observed", w @ x)
    arrays = {n: v.cpu().numpy() for n, v in totals.items()}
    return Sums(arrays["expression"], arrays.get("expected"), arrays.get("observed"), arrays["weight"])


def calibrated(
    expression: np.ndarray,
    weight: np.ndarray,
    observed: np.ndarray | None,
    expected: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Group means, times observed over expected counts of the group.

    A decoder smooths, and it is one point: neither its error nor the counts' noise is in the draws of the
    cells. The ratio of the group's weighted counts to what the model expects of them takes out the first and
    brings in the second. Its prior is `PRIOR_COUNTS` counts that agree with the model, of weight
    Gamma(`PRIOR_COUNTS`).

    Parameters
    ----------
    expression, weight
        (s, g) weighted sums, and sums of weights that broadcast to it. Without weight the mean is 0.
    observed, expected
        (s, g) counts and their expectations with the same weights; None: the means of the model alone.
    rng
        Of the prior's weights.

    Returns
    -------
    numpy.ndarray
        (s, g) float32.
    """
    mean = expression / np.maximum(weight.astype(np.float32), _TINY)
    if observed is not None and expected is not None:
        prior = rng.standard_gamma(PRIOR_COUNTS, expected.shape, np.float32)
        mean *= (observed + prior) / (expected + np.float32(PRIOR_COUNTS))
    return mean.astype(np.float32, copy=False)
