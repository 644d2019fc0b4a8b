"""What a model is made of: its latent sites, read off one run on made-up cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pyro import poutine
from pyro.poutine import Trace

from pyrosc.data.inputs import dummy_batch
from pyrosc.data.schema import MAIN
from pyrosc.infer.handlers import RefuseParam, cells_plate, is_latent, is_local, is_observed, source_of
from pyrosc.infer.modes import evaluating

if TYPE_CHECKING:
    from pyrosc.models.base import Model


def prototype(model: Model) -> Trace:
    """Trace of the model on made-up cells, latent sites drawn from the prior."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    made_up = dummy_batch(model.registries, model.device)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made_up.items()}
    with evaluating(model, 0), poutine.block(), torch.no_grad(), model.minibatch(batch):
        guarded = RefuseParam(type(model).__name__)(model.model)
        return poutine.trace(guarded).get_trace(**model.inputs(batch))


def latent_sites(model: Model) -> dict[str, bool]:
    """Latent sites of the model, and whether each is local (inside the plate over cells)."""
    return {name: is_local(site) for name, site in prototype(model).nodes.items() if is_latent(site)}


def sites_of_cells(model: Model, source: str = MAIN) -> list[str]:
    """Latent and deterministic sites of the model in the plate over the cells of a source."""
    plate = cells_plate(source)
    return [
        name
        for name, site in prototype(model).nodes.items()
        if source_of(site) == source and not is_observed(site) and name != plate
    ]


def enumerated_sites(model: Model) -> set[str]:
    """Discrete sites that the model itself sums out."""
    return {
        name
        for name, site in prototype(model).nodes.items()
        if is_latent(site) and (site.get("infer") or {}).get("enumerate")
    }


def need_site(model: Model, site: str, what: str, attribute: str | None) -> None:
    """Raise a KeyError that says which site a result needs, which there are, and how to name another."""
    sites = [n for n, s in prototype(model).nodes.items() if s["type"] == "sample"]
    if site not in sites:
        hint = f"; set {attribute} = '<site>' in the class" if attribute else ""
        raise KeyError(f"{type(model).__name__} has no site '{site}' for {what}; it has {sites}{hint}")
