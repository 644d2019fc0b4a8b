"""How well a model explains cells: ELBO, its parts, and the importance-weighted likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyrosc.infer.elbo import closed_form_kl
from pyrosc.infer.handlers import is_latent, is_observed, plates_of
from pyrosc.infer.posterior import traces

if TYPE_CHECKING:
    from pyrosc.models.base import Model


@torch.no_grad()
def parts_per_cell(model: Model, batch: Mapping[str, Tensor], n_samples: int) -> dict[str, Tensor]:
    """Terms of the ELBO of each cell, averaged over draws.

    Returns
    -------
    dict
        ``"reconstruction"`` (n,): expected log-likelihood of the observed sites; ``"kl"`` (n,): KL of the
        cell's latent sites; ``"kl_global"`` (): KL of the global sites, whole.
    """
    if n_samples > 1 and not model.vectorized:
        single = [parts_per_cell(model, batch, 1) for _ in range(n_samples)]
        return {k: torch.stack([s[k] for s in single]).mean(0) for k in single[0]}
    guide_trace, model_trace = traces(model, batch, n_samples)
    analytic = getattr(model.elbo, "analytic_kl", False)
    n = next(iter(batch.values())).shape[0]
    device = next(model.parameters()).device
    reconstruction, kl = torch.zeros(n, device=device), torch.zeros(n, device=device)
    kl_global = torch.zeros((), device=device)
    for name, site in model_trace.nodes.items():
        if is_observed(site):
            reconstruction = reconstruction + _mean_over_draws(_density(site), n)
        elif is_latent(site):
            guide_site = guide_trace.nodes[name]
            value = closed_form_kl(guide_site["fn"], site["fn"]) if analytic else None
            if value is None:
                value = _density(guide_site) - _density(site)
            if _local(site):
                kl = kl + _mean_over_draws(value, n)
            else:
                kl_global = kl_global + value.sum() / n_samples
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
        weights = log_weights(*traces(model, batch, k), n)
        here = torch.logsumexp(weights, 0)
        best = here if best is None else torch.logaddexp(best, here)
        done += k
    assert best is not None
    return best - math.log(n_samples)


def log_weights(guide_trace: Trace, model_trace: Trace, n: int) -> Tensor:
    """log p(x, z) − log q(z) of each draw and cell: (draws, n)."""
    total: Tensor | float = 0.0
    for site in model_trace.nodes.values():
        if (is_observed(site) or is_latent(site)) and _local(site):
            total = total + _density(site)
    for site in guide_trace.nodes.values():
        if is_latent(site) and _local(site):
            total = total - _density(site)
    assert isinstance(total, Tensor)
    return total.reshape(-1, n)


def _density(site: Any) -> Tensor:
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, 1.0, site["mask"])


def _mean_over_draws(value: Tensor, n: int) -> Tensor:
    return value.reshape(-1, n).mean(0)


def _local(site: Any) -> bool:
    return any(p.startswith("cells") for p in plates_of(site))
