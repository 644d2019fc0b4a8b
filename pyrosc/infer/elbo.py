"""The evidence lower bound for guides whose draws are all reparameterised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence

from pyrosc.infer.handlers import is_latent


class PathwiseELBO(ELBO):
    """Monte Carlo ELBO with pathwise gradients: log p(x, z) − log q(z) at z drawn from q.

    Value and gradient equal those of ``pyro.infer.Trace_ELBO`` for guides whose sites are all
    reparameterised, without its score-function terms and its synchronisation at each site.

    Parameters
    ----------
    analytic_kl
        Use KL(q ‖ p) in closed form at each site where it is known, in place of the difference of
        log-densities at the draw: the same expectation, less variance.
    num_particles
        Number of draws.
    max_plate_nesting
        Number of dims to the left of the event dims that plates take; ``cells`` alone is 1.
    vectorize_particles
        Draw all particles in one pass, in a further plate on the left.
    """

    def __init__(
        self,
        analytic_kl: bool = False,
        num_particles: int = 1,
        max_plate_nesting: int = 1,
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self.analytic_kl = analytic_kl

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Negative ELBO as a scalar tensor to differentiate.

        Raises
        ------
        ValueError
            While Pyro's validation is on: if a guide site is not reparameterised, or model and guide
            do not match.
        """
        total = torch.zeros(())
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            total = total + self._loss(model_trace, guide_trace) / self.num_particles
        return total

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Negative ELBO as a number, without gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        if is_validation_enabled():
            _check_sites(model_trace, guide_trace)
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            _check_reparameterised(guide_trace)
            if self.analytic_kl:
                _check_order(model_trace, guide_trace)
        return model_trace, guide_trace

    def _loss(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        total: Tensor | float = 0.0
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if is_latent(site):
                total = total + self._divergence(guide_trace.nodes[name], site)
            else:
                total = total - _log_prob(site)
        for name, site in guide_trace.nodes.items():
            if is_latent(site) and name not in model_trace.nodes:  # auxiliary draws of the guide
                total = total + _log_prob(site)
        if not isinstance(total, Tensor):
            return torch.tensor(float(total))
        return total

    def _divergence(self, guide_site: Any, model_site: Any) -> Tensor | float:
        if self.analytic_kl and _same_scale(guide_site, model_site):
            kl = closed_form_kl(guide_site["fn"], model_site["fn"])
            if kl is not None:
                return _summed(kl, guide_site)
        return _log_prob(guide_site) - _log_prob(model_site)


def closed_form_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q ‖ p) per batch element, or None where it is not known in closed form."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _same_scale(a: Any, b: Any) -> bool:
    return a["scale"] is b["scale"] or bool(torch.as_tensor(a["scale"] == b["scale"]).all())


def _summed(value: Tensor, site: Any) -> Tensor:
    return scale_and_mask(value, site["scale"], site["mask"]).sum()


def _log_prob(site: Any) -> Tensor | float:
    if site["mask"] is False:
        return 0.0
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    if is_validation_enabled():
        check_site_shape({**site, "log_prob": value}, float("inf"))  # type: ignore[arg-type]
    return _summed(value, site)


def _check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    in_model = {n for n, s in model_trace.nodes.items() if is_latent(s)}
    in_guide = {n for n, s in guide_trace.nodes.items() if is_latent(s)}
    if missing := sorted(in_model - in_guide):
        raise ValueError(
            f"the guide has no site for {missing} of the model; add pyro.sample({missing[0]!r}, ...) to it. "
            "A discrete site can be summed out: infer={'enumerate': 'parallel'} in the model, and elbo = "
            "TraceEnum_ELBO(max_plate_nesting=1)"
        )
    nodes: Any = guide_trace.nodes
    auxiliary = {n for n in in_guide if nodes[n]["infer"].get("is_auxiliary")}
    if extra := sorted(in_guide - in_model - auxiliary):
        raise ValueError(
            f"the guide has sites that the model has not: {extra}; name them as in the model, or mark them "
            "infer={'is_auxiliary': True}"
        )


def _check_reparameterised(guide_trace: Trace) -> None:
    for name, site in guide_trace.nodes.items():
        if is_latent(site) and not getattr(site["fn"], "has_rsample", False):
            raise ValueError(
                f"site '{name}' of the guide cannot be drawn with pathwise gradients "
                f"({type(site['fn']).__name__}); enumerate it with elbo = "
                "TraceEnum_ELBO(max_plate_nesting=1), or use pyro.infer.Trace_ELBO"
            )


def _check_order(model_trace: Trace, guide_trace: Trace) -> None:
    in_guide = [n for n, s in guide_trace.nodes.items() if is_latent(s) and n in model_trace.nodes]
    in_model = [n for n, s in model_trace.nodes.items() if is_latent(s)]
    if in_guide != in_model:
        raise ValueError(
            f"the closed-form KL needs latent sites in one order; the guide draws {in_guide}, the model "
            f"{in_model}. Re-order them, or use PathwiseELBO(analytic_kl=False)"
        )
