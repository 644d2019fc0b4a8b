"""How well a model explains cells: ELBO, its parts, and the importance-weighted likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyrosc.infer.elbo import closed_form_kl, closed_form_sites
from pyrosc.infer.enumeration import density, enumerated_dims
from pyrosc.infer.handlers import is_latent, is_local, is_observed, source_of
from pyrosc.infer.posterior import traces

if TYPE_CHECKING:
    from pyrosc.models.base import Model


@torch.no_grad()
def parts_per_cell(model: Model, batch: Mapping[str, Tensor], n_samples: int) -> dict[str, Tensor]:
    """Terms of the ELBO of each cell, averaged over draws.

    Sites that the model sums out are in the reconstruction, with all that depends on them.

    Returns
    -------
    dict
        ``"reconstruction"`` (n,): expected log-likelihood of the observed sites; ``"kl"`` (n,): KL of the
        cell's latent sites; ``"kl_global"`` (): KL of the global sites, whole.
    """
    if n_samples > 1 and not model.vectorized:
        single = [parts_per_cell(model, batch, 1) for _ in range(n_samples)]
        return {k: torch.stack([s[k] for s in single]).mean(0) for k in single[0]}
    guide_trace, model_trace = traces(model, batch, n_samples, enumerate_model=True)
    analytic = getattr(model.elbo, "analytic_kl", False)
    closed = closed_form_sites(model_trace, guide_trace) if analytic else set()
    dims = enumerated_dims(model_trace)
    n = next(iter(batch.values())).shape[0]
    device = next(model.parameters()).device
    joint, kl = torch.zeros(n, device=device), torch.zeros(n, device=device)
    kl_global = torch.zeros((), device=device)
    for name, site in model_trace.nodes.items():
        if is_observed(site) or name in dims:
            joint = joint + density(site)
        elif is_latent(site):
            guide_site = guide_trace.nodes[name]
            if dims and is_local(site) and _depends(density(site), dims):
                joint, value = joint + density(site), density(guide_site)
            else:
                exact = closed_form_kl(guide_site["fn"], site["fn"]) if name in closed else None
                value = density(guide_site) - density(site) if exact is None else exact
            if is_local(site):
                kl = kl + _mean_over_draws(value, n)
            else:
                kl_global = kl_global + value.sum() / n_samples
    for name, site in guide_trace.nodes.items():
        if is_latent(site) and name not in model_trace.nodes:  # auxiliary draws of the guide
            if is_local(site):
                kl = kl + _mean_over_draws(density(site), n)
            else:
                kl_global = kl_global + density(site).sum() / n_samples
    reconstruction = _mean_over_draws(_summed_out(joint, dims), n)
    return {"reconstruction": reconstruction, "kl": kl, "kl_global": kl_global}


@torch.no_grad()
def marginal_log_likelihood(model: Model, batch: Mapping[str, Tensor], n_samples: int, chunk: int) -> Tensor:
    """Importance-weighted log p(x) of each cell: log mean over draws of p(x, z)/q(z).

    Burda, Grosse and Salakhutdinov (2016), eq. 8. Global sites are drawn once per chunk and their own
    densities left out, so that with global sites this is the likelihood given draws of them.

    Returns
    -------
    Tensor
        (n,) nats.
    """
    n = next(iter(batch.values())).shape[0]
    best: Tensor | None = None
    done = 0
    while done < n_samples:
        k = min(chunk, n_samples - done) if model.vectorized else 1
        guide_trace, model_trace = traces(model, batch, k, enumerate_model=True)
        here = torch.logsumexp(log_weights(guide_trace, model_trace, n), 0)
        best = here if best is None else torch.logaddexp(best, here)
        done += k
        if _is_point(guide_trace):  # all draws are the same
            break
    assert best is not None
    return best - math.log(done)


def log_weights(guide_trace: Trace, model_trace: Trace, n: int, source: str | None = None) -> Tensor:
    """log p(x, z) − log q(z) of each draw and cell, (draws, n); of the cells of one source, if named."""

    def counted(site: Any) -> bool:
        return is_local(site) if source is None else source_of(site) == source

    total: Tensor | float = 0.0
    for site in model_trace.nodes.values():
        if (is_observed(site) or is_latent(site)) and counted(site):
            total = total + density(site)
    assert isinstance(total, Tensor)
    total = _summed_out(total, enumerated_dims(model_trace))
    for site in guide_trace.nodes.values():
        if is_latent(site) and counted(site):
            total = total - density(site)
    return total.reshape(-1, n)


def _summed_out(joint: Tensor, dims: Mapping[str, int]) -> Tensor:
    return joint.logsumexp(tuple(dims.values())) if dims else joint


def _depends(value: Tensor, dims: Mapping[str, int]) -> bool:
    return any(value.dim() >= -d and value.shape[d] > 1 for d in dims.values())


def _is_point(guide_trace: Trace) -> bool:
    nodes: Mapping[str, Any] = guide_trace.nodes
    return all(isinstance(s["fn"], dist.Delta) for s in nodes.values() if is_latent(s))


def _mean_over_draws(value: Tensor, n: int) -> Tensor:
    return value.reshape(-1, n).mean(0)
