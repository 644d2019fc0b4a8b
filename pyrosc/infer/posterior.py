"""One pass over cells for any sites: the guide's means, or draws from it, pushed through the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrosc.data.inputs import apply_do
from pyrosc.infer.elbo import plate_nesting
from pyrosc.infer.enumeration import conditional, enumerated
from pyrosc.infer.handlers import Fix, Means, is_latent, is_local
from pyrosc.infer.modes import evaluating

if TYPE_CHECKING:
    from pyrosc.models.base import Model

#: Values of a site held at once while drawing: 16 Mi floats are 64 MB.
_BUDGET = 2**24


def traces(
    model: Model,
    batch: Mapping[str, Tensor],
    n_draws: int = 0,
    do: Mapping[str, Tensor] | None = None,
    fixed: Mapping[str, Tensor] | None = None,
    enumerate_model: bool = False,
) -> tuple[Trace, Trace]:
    """Traces of guide and model for one minibatch.

    Sites that the model sums out are not the guide's: they are drawn given the data and the guide's values
    (without draws: at their likeliest values), and carry their ``"probabilities"`` (..., n, k) in the trace.

    Parameters
    ----------
    model
        The model.
    batch
        Minibatch.
    n_draws
        Draws: 0 puts the guide's means in their place; more than one are a plate on the left of all
        others, for models that are `vectorized`.
    do
        Arguments replaced in the model, not in the guide: what the cells would have been.
    fixed
        Values of latent sites to use in place of draws.
    enumerate_model
        Give the sites that the model sums out all of their values, along dims on the left.
    """
    summed_out = model.summed_out  # asked here, since to find out runs the model
    with _drawing(model, batch, n_draws, fixed) as stack:
        inputs = model.inputs(batch)
        from_guide = poutine.trace(model.guided).get_trace(**inputs)
        values = from_guide
        if do and model.recoded:
            nodes: Any = from_guide.nodes
            kept = {n: s["value"] for n, s in nodes.items() if is_latent(s) and n not in model.recoded}
            with Fix(kept):
                values = poutine.trace(model.guided).get_trace(**{**inputs, **do})
        replayed = poutine.replay(model.model, trace=values)
        probabilities: dict[str, Tensor] = {}
        if summed_out:
            trace = enumerated(model, replayed, inputs, n_draws)
            if enumerate_model:
                return from_guide, trace
            found = conditional(trace, n_draws)
            stack.enter_context(Fix({name: value for name, (value, _) in found.items()}))
            probabilities = {name: p for name, (_, p) in found.items()}
        model_trace = poutine.trace(replayed).get_trace(**{**inputs, **(do or {})})
        nodes = model_trace.nodes
        for name, p in probabilities.items():
            nodes[name]["probabilities"] = p
    return from_guide, model_trace


def guide_trace(
    model: Model, batch: Mapping[str, Tensor], n_draws: int = 0, fixed: Mapping[str, Tensor] | None = None
) -> Trace:
    """Trace of the guide alone for one minibatch; arguments as of `traces`."""
    with _drawing(model, batch, n_draws, fixed):
        return poutine.trace(model.guided).get_trace(**model.inputs(batch))


@contextmanager
def _drawing(
    model: Model, batch: Mapping[str, Tensor], n_draws: int, fixed: Mapping[str, Tensor] | None
) -> Iterator[ExitStack]:
    """Around passes: which rows the minibatch is of, and how many draws are taken."""
    with ExitStack() as stack:
        stack.enter_context(model.minibatch(batch))
        stack.enter_context(torch.no_grad())
        if fixed:
            stack.enter_context(Fix(fixed))
        if n_draws > 1:
            dim = -1 - plate_nesting(model.elbo)
            stack.enter_context(pyro.plate("_draws", n_draws, dim=dim))
        elif n_draws == 0:
            stack.enter_context(Means())
        yield stack


def stream(
    model: Model,
    sites: Sequence[str],
    batches: Iterator[tuple[np.ndarray, dict[str, Tensor]]],
    *,
    n_samples: int = 0,
    reduce: str | Sequence[float] | None = "mean",
    do: Mapping[str, Mapping[int, Tensor]] | None = None,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, dict[str, tuple[Tensor, bool]]]]:
    """Values of sites, a minibatch at a time; see `pyrosc.models.Model.posterior` for the arguments.

    Yields
    ------
    tuple
        Positions of the cells, and by site its value and whether it is local.
    """
    if n_samples == 0 and reduce != "mean":
        raise ValueError("draws or quantiles need n_samples > 0")
    names = list(dict.fromkeys(sites))
    plan = SharedDraws()
    with evaluating(model, seed):
        for rows, batch in batches:
            changed = apply_do(batch, do or {}, rows)
            yield (
                rows,
                _batch_values(model, names, batch, len(rows), n_samples, reduce, changed, plan),
            )


def collect(
    values: Iterator[tuple[np.ndarray, dict[str, tuple[Tensor, bool]]]], n_total: int, reduced: bool
) -> dict[str, np.ndarray]:
    """Arrays over all cells from what `stream` yields; draws or quantiles stay the first axis."""
    out: dict[str, np.ndarray] = {}
    axis = 0 if reduced else 1
    for rows, here in values:
        for name, (value, local) in here.items():
            array = value.cpu().numpy()
            if not local:
                out.setdefault(name, array)
                continue
            if name not in out:
                shape = (*array.shape[:axis], n_total, *array.shape[axis + 1 :])
                out[name] = np.empty(shape, array.dtype)
            if n_total:
                out[name][(slice(None),) * axis + (rows,)] = array
    return out


@dataclass
class SharedDraws:
    """What the minibatches of a pass share: how the draws are cut, and the draws of global sites."""

    chunk: int | None = None
    values: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def _batch_values(
    model: Model,
    names: list[str],
    batch: Mapping[str, Tensor],
    n_cells: int,
    n_samples: int,
    reduce: str | Sequence[float] | None,
    do: Mapping[str, Tensor],
    plan: SharedDraws,
) -> dict[str, tuple[Tensor, bool]]:
    values: dict[str, tuple[Tensor, bool]] = {}
    totals: dict[str, list[Tensor]] = {}
    done, chunk = 0, 1 if n_samples else 0
    while True:
        guide_trace, model_trace = traces(model, batch, chunk, do, plan.values.get(done))
        if n_samples and done not in plan.values:
            plan.values[done] = globals_of(guide_trace)
        width = 1
        for name in names:
            node, local = _node(model, name, guide_trace, model_trace)
            value = site_value(node, chunk, local, n_cells, plate_nesting(model.elbo)).detach()
            width = max(width, value[0].numel() if chunk else 1)
            if not chunk:
                values[name] = (value, local)
            elif reduce == "mean" and name in totals:
                totals[name][0] += value.sum(0)
            else:
                totals.setdefault(name, []).append(value.sum(0) if reduce == "mean" else value)
            if chunk and name not in values:
                values[name] = (value, local)  # keeps whether it is local
        done += chunk
        if done >= n_samples:
            break
        if plan.chunk is None:
            plan.chunk = draws_at_once(model, n_samples, width)
        chunk = min(plan.chunk, n_samples - done)
    for name, parts in totals.items():
        local = values[name][1]
        if reduce == "mean":
            values[name] = (parts[0] / n_samples, local)
        else:
            draws = torch.cat(parts)
            if reduce is not None:
                quantiles = torch.as_tensor(list(reduce), dtype=draws.dtype, device=draws.device)
                draws = torch.quantile(draws, quantiles, dim=0)
            values[name] = (draws, local)
    return values


def globals_of(guide_trace: Trace) -> dict[str, Tensor]:
    """Values of the global latent sites of a guide's trace."""
    nodes: Mapping[str, Any] = guide_trace.nodes
    return {name: site["value"] for name, site in nodes.items() if is_latent(site) and not is_local(site)}


def _node(model: Model, name: str, guide_trace: Trace, model_trace: Trace) -> tuple[Any, bool]:
    node: Any = model_trace.nodes.get(name) or guide_trace.nodes.get(name)
    if node is None:
        nodes = guide_trace.nodes | model_trace.nodes
        known = sorted(n for n, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s))
        raise KeyError(f"{type(model).__name__} has no site '{name}'; it has {known}")
    local = is_local(node)
    discrete = is_latent(node) and getattr(node["fn"], "has_enumerate_support", False)
    if discrete and name not in guide_trace.nodes:
        return {**node, "value": node["probabilities"], "probabilities": True}, local
    if discrete:
        fn: Any = guide_trace.nodes[name]["fn"]  # has the draws' dim, which the model's may lack
        return {**node, "fn": fn, "value": fn.probs, "probabilities": True}, local
    return node, local


def site_value(node: Any, n_draws: int, local: bool, n_cells: int, nesting: int) -> Tensor:
    """Value of a site as (draws, n, ...), or (n, ...) for means; plate dims left out are put in."""
    value = node["value"]
    event = (
        value.ndim - len(node["fn"].batch_shape) if node.get("probabilities") else len(node["fn"].event_shape)
    )
    own = value.ndim - event  # batch dims: the draws, where they are a plate, and the site's own plates
    plated = n_draws > 1 and own > nesting
    if plated and not local:  # the draws' plate stands to the left of plates that are not the site's
        dims = {f.dim for f in node["cond_indep_stack"] if f.vectorized and f.name != "_draws"}
        for dim in range(-nesting, 0):
            if dim not in dims:
                value = value.squeeze(dim - event)
    if local:
        if own == 0:
            value, own = value.unsqueeze(0), 1
        cells = own - 1
        if value.shape[cells] != n_cells:
            value = value.expand(*value.shape[:cells], n_cells, *value.shape[cells + 1 :])
        value = value.movedim(cells, 1 if plated else 0)
    if n_draws and not plated:  # one draw, or a value that does not depend on the draws
        value = value.expand(n_draws, *value.shape)
    return value


def draws_at_once(model: Model, wanted: int, width: int) -> int:
    """How many draws to take in one pass: one for models that do not broadcast, else what memory allows."""
    return max(1, min(wanted, _BUDGET // max(width, 1))) if model.vectorized else 1
