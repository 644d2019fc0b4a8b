"""Replicated data: what a model would draw for cells that it has seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyrosc.data.errors import listed
from pyrosc.data.inputs import apply_do
from pyrosc.data.schema import MAIN
from pyrosc.infer.handlers import Fix, Uncondition, is_observed, source_of
from pyrosc.infer.modes import evaluating
from pyrosc.infer.posterior import globals_of, traces
from pyrosc.infer.structure import prototype

if TYPE_CHECKING:
    from pyrosc.models.base import Model


def counts_site(model: Model, source: str = MAIN) -> str:
    """Name of the observed site of a source's counts; of any data where there are no counts.

    Raises
    ------
    KeyError
        If nothing is observed of the cells of the source.
    """
    nodes: Mapping[str, Any] = prototype(model).nodes
    observed = [n for n, s in nodes.items() if is_observed(s)]
    if len(model.registries) > 1:
        observed = [n for n in observed if source_of(nodes[n]) == source]
    if not observed:
        of = "" if len(model.registries) == 1 else f" of the cells of '{source}'"
        raise KeyError(f"{type(model).__name__} has no observed site{of}")
    counts = {n for n, s in model.registries[source].fields.items() if s.kind == "counts"}
    return next((n for n in observed if n in counts), observed[0])


def arguments_observed(model: Model, batch: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Which argument of the model is the value of each observed site, by site; None for computed values."""
    nodes: Mapping[str, Any] = traces(model, batch)[1].nodes
    inputs = model.inputs(batch).items()
    return {
        name: next((argument for argument, value in inputs if site["value"] is value), None)
        for name, site in nodes.items()
        if is_observed(site)
    }


def prior_trace(
    model: Model, batch: Mapping[str, Tensor], fixed: Mapping[str, Tensor] | None = None
) -> Trace:
    """Trace of the model on a minibatch with latent and observed sites drawn from their laws.

    Parameters
    ----------
    model
        The model.
    batch
        Minibatch: what the model is told of its cells.
    fixed
        Values of latent sites to use in place of draws.
    """
    with model.minibatch(batch), Fix(fixed or {}), Uncondition(), torch.no_grad():
        return poutine.trace(model.model).get_trace(**model.inputs(batch))


def replicates(
    model: Model,
    batches: Iterable[tuple[np.ndarray, dict[str, Tensor]]],
    site: str,
    n_samples: int,
    *,
    do: Mapping[str, Mapping[int, Tensor]] | None = None,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, Tensor, Iterator[Any]]]:
    """Laws of an observed site at draws from the posterior, a minibatch at a time.

    Global sites are drawn once per replicate, so that a replicate is one data set; the model is in
    evaluation mode and no global generator is touched, neither here nor by what the caller draws from the
    laws while a minibatch is in hand.

    Parameters
    ----------
    model
        The model.
    batches
        Minibatches, as ``model.batches`` gives them.
    site
        Name of the observed site.
    n_samples
        Number of replicates.
    do
        What-if values, encoded.
    seed
        Of the draws.

    Yields
    ------
    tuple
        Positions of the cells, their observed values (n, ...), and an iterator of `n_samples` laws to draw
        replicated values from.
    """
    shared: list[dict[str, Tensor]] = []
    argument: str | None = None  # that the site's values are; "" where they are computed

    def laws(batch: Mapping[str, Tensor], what_if: Mapping[str, Tensor]) -> Iterator[Any]:
        for s in range(n_samples):
            fixed = shared[s] if s < len(shared) else None
            guide_trace, model_trace = traces(model, batch, 1, what_if, fixed)
            if fixed is None:
                shared.append(globals_of(guide_trace))
            yield model_trace.nodes[site]["fn"]

    with evaluating(model, seed):
        for at, batch in batches:
            if argument is None:
                argument = arguments_observed(model, batch).get(site) or ""
            observed = batch[argument] if argument else _observed(model, batch, site)
            yield at, observed, laws(batch, apply_do(batch, do or {}, at))


def _observed(model: Model, batch: Mapping[str, Tensor], site: str) -> Tensor:
    nodes: Mapping[str, Any] = traces(model, batch)[1].nodes
    if site not in nodes or not is_observed(nodes[site]):
        known = [n for n, s in nodes.items() if is_observed(s)]
        raise KeyError(f"{type(model).__name__} has no observed site '{site}'; it has {listed(known)}")
    return nodes[site]["value"]


def elementwise(law: Any) -> Any | None:
    """The law of single values where the law of a cell's values is their product; None where it is not."""
    if getattr(law, "reinterpreted_batch_ndims", None) == 1 and law.base_dist.event_shape == ():
        return law.base_dist
    return None
