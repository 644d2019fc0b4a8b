"""From a minibatch to a loss: the plate over cells, and the negative ELBO of model and guide on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrosc.data import MAIN
from pyrosc.data.inputs import present_key, rows_key
from pyrosc.infer.handlers import Anneal, Measured, Record, cells_plate
from pyrosc.infer.structure import enumerated_sites, latent_sites
from pyrosc.models.hooks import Hooks
from pyrosc.tools.surgery import Surgery

_CURRENT: ContextVar[Objective | None] = ContextVar("pyrosc_model", default=None)


def cells(x: Tensor, source: str = MAIN) -> pyro.plate:
    """The plate over the minibatch's cells, for model functions that have no ``self``.

    Parameters
    ----------
    x
        Any argument of the model for these cells, (n, ...).
    source
        Data source of the cells.
    """
    model = _CURRENT.get()
    return pyro.plate("cells", len(x), dim=-1) if model is None else model.cells(x, source)


class Objective(Hooks):
    """A model/guide pair that is a function of minibatches, with their negative ELBO as its value."""

    n_train: dict[str, int]
    surgery: Surgery | None
    _rows: dict[str, Tensor]
    _latents: dict[str, bool]
    _summed_out: set[str]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def cells(self, x: Tensor, source: str = MAIN) -> pyro.plate:
        """The plate over the cells of a minibatch: dim −1, scaled to the number of training cells.

        Called outside of `forward` (on a whole data set, say, for MCMC) it holds the cells given.

        Parameters
        ----------
        x
            Any argument of the model for these cells, (n, ...).
        source
            Data source of the cells.
        """
        name = cells_plate(source)
        rows = self._rows.get(source) if hasattr(self, "_rows") else None
        if rows is None:
            return pyro.plate(name, len(x), dim=-1)
        return pyro.plate(name, self.n_train[source], subsample=rows, dim=-1)

    @contextmanager
    def minibatch(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Tell `cells` which rows of the training data the arguments are; leave out what was not measured."""
        rows = {s: batch[rows_key(s)] for s in self.registries if rows_key(s) in batch}
        present = {n: batch[present_key(n)] for n in batch if present_key(n) in batch}
        if self.surgery is not None and not self.surgery.masks:
            present = {}
        outer = getattr(self, "_rows", {}), getattr(self, "_present", {})
        token = _CURRENT.set(self)
        try:
            object.__setattr__(self, "_rows", rows)
            object.__setattr__(self, "_present", present)
            with (
                Measured({n: (batch[n], which) for n, which in present.items()}) if present else nullcontext()
            ):
                yield
        finally:
            _CURRENT.reset(token)
            object.__setattr__(self, "_rows", outer[0])
            object.__setattr__(self, "_present", outer[1])

    def measured(self, field: str) -> Tensor | None:
        """Which genes of a counts field the cells of the minibatch at hand have, (g,) bool; None for all.

        The others are zero, and their likelihood is left out; see `pyrosc.surgery`. A guide whose counts are
        `filled` sees all.
        """
        present: dict[str, Tensor] = getattr(self, "_present", {})
        return None if getattr(self, "_filling", False) else present.get(field)

    def filled(self, field: str, x: Tensor) -> Tensor:
        """Counts (..., n, g) as encoders see them: at the reference's mean in genes that the cells lack.

        That is what ``missing_genes="mean"`` of `pyrosc.surgery` asks for; else they are as they come. The
        mean is that of the reference's cells at the depth of each cell in the genes that it has.
        """
        found = self._mean_of_missing(field)
        if found is None or getattr(self, "_filling", False):  # a guide has them filled already
            return x
        measured, mean = found
        if self.support().get(field) != "real":
            mean = mean * (x.sum(-1, keepdim=True) / mean[measured].sum())
        return torch.where(measured, x, mean)

    def log_share_measured(self, field: str) -> Tensor | float:
        """Log of the share of the reference's counts that is in genes measured; 0 where none are `filled`.

        What a guide says of the total of filled counts is higher than that of what was counted by so much.
        """
        found = self._mean_of_missing(field)
        if found is None:
            return 0.0
        measured, mean = found
        return (mean[measured].sum() / mean.sum()).log()

    def _mean_of_missing(self, field: str) -> tuple[Tensor, Tensor] | None:
        """Genes measured and the reference's mean, both (g,), where the others are to be filled with it."""
        present: dict[str, Tensor] = getattr(self, "_present", {})
        if field not in present or self.surgery is None or self.surgery.missing_genes != "mean":
            return None
        return present[field], getattr(self, self.surgery.mean_of(field))

    def guided(self, **inputs: Tensor) -> Any:
        """The guide on arguments of the model, with their counts `filled`."""
        counts = [n for n in inputs if self._mean_of_missing(n) is not None]
        if not counts:
            return self.guide(**inputs)
        filled = inputs | {n: self.filled(n, inputs[n]) for n in counts}
        object.__setattr__(self, "_filling", True)
        try:
            return self.guide(**filled)
        finally:
            object.__setattr__(self, "_filling", False)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments of model and guide in a minibatch."""
        return {k: v for k, v in batch.items() if not k.startswith("_")}

    def loss(
        self, batch: Mapping[str, Tensor], kl_weight: float = 1.0, record: Record | None = None
    ) -> Tensor:
        """Negative ELBO per cell of a minibatch, with the KL of `annealed` sites at a weight."""
        anneal = nullcontext() if kl_weight == 1 else Anneal(kl_weight, self.annealed_sites)
        with self.minibatch(batch), anneal, record or nullcontext():
            inputs = self.inputs(batch)
            elbo: Any = self.elbo  # Pyro's base class does not declare its losses
            if torch.is_grad_enabled():
                value = elbo.differentiable_loss(self.model, self.guided, **inputs)
            else:  # TraceEnum_ELBO insists on a gradient in differentiable_loss
                value = torch.as_tensor(elbo.loss(self.model, self.guided, **inputs))
        return value / sum(self.n_train.values())

    def forward(self, batch: Mapping[str, Tensor], kl_weight: float = 1.0) -> Tensor:
        """Negative ELBO per cell (nats) of one minibatch: what is differentiated, and what DDP wraps."""
        return self.loss(batch, kl_weight)

    @property
    def annealed_sites(self) -> tuple[str, ...]:
        """Sites whose KL is annealed: `annealed`, or the local latent sites but the library."""
        if self.annealed is not None:
            return self.annealed
        return tuple(s for s in self.latent_sites(local=True) if s not in {"library", *self.summed_out})

    def latent_sites(self: Any, local: bool | None = None) -> list[str]:
        """Names of the latent sites of the model; local ones are inside the plate over cells."""
        if not hasattr(self, "_latents"):
            object.__setattr__(self, "_latents", latent_sites(self))
        return [name for name, is_local in self._latents.items() if local is None or is_local == local]

    @property
    def summed_out(self: Any) -> set[str]:
        """Names of the discrete sites that the model enumerates, so that the guide has none of them."""
        if not hasattr(self, "_summed_out"):
            object.__setattr__(self, "_summed_out", enumerated_sites(self))
        return self._summed_out
