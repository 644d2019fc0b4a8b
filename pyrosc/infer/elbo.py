"""The evidence lower bound for guides whose draws are reparameterised, or enumerated."""

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

    Discrete sites of the guide marked ``infer={"enumerate": "parallel"}`` are summed out: each takes all of
    its values in a plate dim on the left, and every term that depends on it is weighted by q of the value,
    as in ``pyro.infer.TraceEnum_ELBO``. Where such a site is masked (labelled cells), its values weigh
    equally. Discrete sites that the model enumerates need ``TraceEnum_ELBO``.

    Parameters
    ----------
    analytic_kl
        Use KL(q ‖ p) in closed form at each site where it is known, in place of the difference of
        log-densities at the draw: the same expectation, less variance. It is right at a site whose
        predecessors in the model are all drawn before it in the guide; at other sites the draw is used.
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
        guide = poutine.enum(guide, first_available_dim=-1 - int(self.max_plate_nesting))
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        if is_validation_enabled():
            _check_sites(model_trace, guide_trace)
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            _check_reparameterised(guide_trace)
        return model_trace, guide_trace

    def _loss(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        weights = enumerated_weights(guide_trace)
        exact = closed_form_sites(model_trace, guide_trace) if self.analytic_kl else set()
        total: Tensor | float = 0.0
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if is_latent(site):
                total = total + self._divergence(guide_trace.nodes[name], site, name in exact, weights)
            else:
                total = total - _log_prob(site, weights)
        for name, site in guide_trace.nodes.items():
            if is_latent(site) and name not in model_trace.nodes:  # auxiliary draws of the guide
                total = total + _log_prob(site, weights)
        if not isinstance(total, Tensor):
            return torch.tensor(float(total))
        return total

    def _divergence(self, guide_site: Any, model_site: Any, exact: bool, weights: Weights) -> Tensor | float:
        if exact and _same_scale(guide_site, model_site):
            kl = closed_form_kl(guide_site["fn"], model_site["fn"])
            if kl is not None:
                return _summed(kl, guide_site, weights)
        return _log_prob(guide_site, weights) - _log_prob(model_site, weights)


def plate_nesting(elbo: Any) -> int:
    """Dims that the plates of a model take, without the one that Pyro adds for an objective's draws."""
    return int(elbo.max_plate_nesting) - (1 if elbo.num_particles > 1 and elbo.vectorize_particles else 0)


#: Of each enumerated site: its dim (from the right, among batch dims) and q of each of its values.
Weights = list[tuple[int, Tensor]]


def enumerated_weights(guide_trace: Trace) -> Weights:
    """Probabilities of the values of the guide's enumerated sites, laid out along their dims."""
    found: Weights = []
    nodes: Any = guide_trace.nodes
    for site in nodes.values():
        if not _is_enumerated(site):
            continue
        q: Any = site["fn"]
        dim = site["infer"]["_enumerate_dim"]
        weight = q.log_prob(site["value"]).exp()
        if site["mask"] is not None:  # a masked draw stands for nothing: any value does
            weight = torch.where(torch.as_tensor(site["mask"]), weight, 1.0 / weight.shape[dim])
        found.append((dim, weight))
    return found


def closed_form_sites(model_trace: Trace, guide_trace: Trace) -> set[str]:
    """Latent sites whose predecessors in the model are all drawn before them in the guide.

    There, given what was drawn before, the expectation over the site itself is KL(q ‖ p).
    """
    before: dict[str, set[str]] = {}
    drawn: set[str] = set()
    for name, site in guide_trace.nodes.items():
        if is_latent(site):
            before[name] = set(drawn)
            drawn.add(name)
    found, passed = set(), set[str]()
    for name, site in model_trace.nodes.items():
        if is_latent(site):
            if passed <= before.get(name, set()):
                found.add(name)
            passed.add(name)
    return found


def closed_form_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q ‖ p) per batch element, or None where it is not known in closed form."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _same_scale(a: Any, b: Any) -> bool:
    return a["scale"] is b["scale"] or bool(torch.as_tensor(a["scale"] == b["scale"]).all())


def _summed(value: Tensor, site: Any, weights: Weights) -> Tensor:
    value = scale_and_mask(value, site["scale"], site["mask"])
    for dim, weight in weights:
        if value.dim() >= -dim and value.shape[dim] > 1:  # depends on the enumerated site
            value = value * weight
    return value.sum()


def _log_prob(site: Any, weights: Weights) -> Tensor | float:
    if site["mask"] is False:
        return 0.0
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    if is_validation_enabled():
        # dims of enumerated sites are on the left of the plates, and the only ones that are not plates'
        nesting = -1 - max(dim for dim, _ in weights) if weights else float("inf")
        check_site_shape({**site, "log_prob": value}, nesting)  # type: ignore[arg-type]
    return _summed(value, site, weights)


def _is_enumerated(site: Any) -> bool:
    return is_latent(site) and site["infer"].get("_enumerate_dim") is not None


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
        if is_latent(site) and not getattr(site["fn"], "has_rsample", False) and not _is_enumerated(site):
            raise ValueError(
                f"site '{name}' of the guide cannot be drawn with pathwise gradients "
                f"({type(site['fn']).__name__}); sum it out by infer={{'enumerate': 'parallel'}}, or use "
                "pyro.infer.Trace_ELBO"
            )
