"""Why a loss is not a number: the site, the cells, the usual causes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrosc.data.errors import listed
from pyrosc.infer.handlers import source_of

if TYPE_CHECKING:
    from pyrosc.models.base import Model


class TrainingError(RuntimeError):
    """Training met a loss that is NaN or infinite; the weights of the last good epoch are kept."""


def diagnose(
    model: Model, batch: Mapping[str, Tensor], names: Mapping[str, np.ndarray], when: str, blame: str | None
) -> TrainingError:
    """The error that tells a user what is not finite, and the usual causes.

    Parameters
    ----------
    model
        The model, with the weights that gave the loss.
    batch
        The minibatch.
    names
        Names of the minibatch's cells, by source.
    when
        Where in training, for the message.
    blame
        What `culprit` found.
    """
    first = listed(next(iter(names.values())), 3)
    blame = blame or f"no single site is to blame; the minibatch begins with the cells {first}"
    return TrainingError(
        f"the loss is not finite ({when}): {blame}. The weights of the last good epoch are kept. Usual "
        "causes: a learning rate that is too high (fit(lr=…)), cells with extreme counts, covariates of wild "
        "scale, or a log or division of zero in the model"
    )


def culprit(model: Model, batch: Mapping[str, Tensor], names: Mapping[str, np.ndarray]) -> str | None:
    """The first site whose value or density is not finite, and its cells; None where there is none."""
    bad = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        cells = next(iter(names.values()))
        return f"the parameters {listed(bad, 3)} are no longer finite; last minibatch: {listed(cells, 3)}"
    try:
        # without validation, which would refuse the distribution before its site has a name
        with torch.no_grad(), pyro.validation_enabled(False), model.minibatch(batch):
            inputs = model.inputs(batch)
            guide = poutine.trace(model.guided).get_trace(**inputs)
            trace = poutine.trace(poutine.replay(model.model, trace=guide)).get_trace(**inputs)
            return _first_bad(guide, "guide", names) or _first_bad(trace, "model", names)
    except (ValueError, RuntimeError) as error:
        return f"a distribution refused its parameters ({str(error).splitlines()[0]})"


def _first_bad(trace: poutine.Trace, role: str, names: Mapping[str, np.ndarray]) -> str | None:
    nodes: Mapping[str, Any] = trace.nodes
    for name, site in nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        value = site["value"]
        if value.is_floating_point() and not torch.isfinite(value).all():
            where = _where(site, value, len(site["fn"].event_shape), names)
            return f"site '{name}' of the {role} has values that are not finite{where}"
        density = site["fn"].log_prob(value)
        if not torch.isfinite(density).all():
            where = _where(site, density, 0, names)
            return f"the log-density of site '{name}' of the {role} is not finite{where}"
    return None


def _where(site: Any, values: Tensor, event_dims: int, names: Mapping[str, np.ndarray]) -> str:
    source = source_of(site)
    dim = values.ndim - event_dims - 1
    if source is None or dim < 0:
        return ""
    cells = names[source]
    if values.shape[dim] != len(cells):
        return ""
    others = tuple(d for d in range(values.ndim) if d != dim)
    bad = ~torch.isfinite(values)
    flagged = cells[(bad.any(others) if others else bad).cpu().numpy()]  # type: ignore[arg-type]
    return f" in {len(flagged):,} cells (first: {listed(flagged, 3)})"
