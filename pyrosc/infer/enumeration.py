"""Discrete sites of cells that the model sums out: what is known of them once the data are seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyrosc.infer.elbo import plate_nesting
from pyrosc.infer.handlers import is_latent, is_local, is_observed

if TYPE_CHECKING:
    from pyrosc.models.base import Model


def enumerated(
    model: Model, replayed: Callable[..., Any], inputs: Mapping[str, Tensor], n_draws: int
) -> Trace:
    """Trace of the model with every value of the sites that it sums out, along dims on the left.

    Parameters
    ----------
    model
        The model.
    replayed
        Its function, with the guide's values.
    inputs
        Arguments.
    n_draws
        Draws in a plate of their own, as in `pyrosc.infer.posterior.traces`.
    """
    dim = -1 - plate_nesting(model.elbo) - (1 if n_draws > 1 else 0)
    return poutine.trace(poutine.enum(replayed, first_available_dim=dim)).get_trace(**inputs)


def enumerated_dims(trace: Trace) -> dict[str, int]:
    """Dim, from the right, along which each enumerated site takes its values.

    All are sites of cells: Pyro sums others out only where a minibatch is the whole data set.
    """
    nodes: Mapping[str, Any] = trace.nodes
    samples = {name: site["infer"] for name, site in nodes.items() if site["type"] == "sample"}
    return {n: i["_enumerate_dim"] for n, i in samples.items() if i.get("_enumerate_dim") is not None}


def conditional(trace: Trace, n_draws: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The enumerated sites given the data and the other sites: exact, since cells are independent.

    Parameters
    ----------
    trace
        Made by `enumerated`.
    n_draws
        0 for the likeliest values, jointly; else they are drawn.

    Returns
    -------
    dict
        By site, its value (..., n) and the probabilities of its values (..., n, k).
    """
    dims = enumerated_dims(trace)
    nodes: Mapping[str, Any] = trace.nodes
    total = sum(density(s) for s in nodes.values() if is_local(s) and (is_latent(s) or is_observed(s)))
    assert isinstance(total, Tensor)
    order = sorted(dims, key=lambda name: dims[name])
    last = tuple(range(-len(order), 0))
    logits = total.movedim([dims[name] for name in order], last)  # (..., n, k1, k2, ...)
    sizes = logits.shape[-len(order) :]
    flat = logits.flatten(-len(order))
    if n_draws:
        joint = torch.distributions.Categorical(logits=flat, validate_args=False).sample()
    else:
        joint = flat.argmax(-1)
    probabilities = flat.softmax(-1).reshape(logits.shape)
    found = {}
    for at, name in enumerate(order):
        others = [d for i, d in enumerate(last) if i != at]
        code = joint // int(torch.Size(sizes[at + 1 :]).numel()) % sizes[at]
        value = nodes[name]["value"].flatten()[code]
        found[name] = (value, probabilities.sum(others) if others else probabilities)
    return found


def density(site: Any) -> Tensor:
    """Log-density of a site at its value, not scaled to the data."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, 1.0, site["mask"])
