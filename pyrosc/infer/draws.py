"""Draws of one site for a minibatch, under several what-ifs that share the latent values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyrosc.infer.elbo import plate_nesting
from pyrosc.infer.evaluate import log_weights
from pyrosc.infer.handlers import is_latent
from pyrosc.infer.posterior import SharedDraws, globals_of, site_value, traces

if TYPE_CHECKING:
    from pyrosc.models.base import Model


class Draws(NamedTuple):
    """Draws of a site, the means of an observed site's law, and what was observed.

    Attributes
    ----------
    values
        (n_samples, n, g) of the site.
    means
        (n_samples, n, g) of the law, or None.
    observed
        (n, g), or None.
    """

    values: Tensor
    means: Tensor | None
    observed: Tensor | None


@torch.no_grad()
def draws_of(
    model: Model,
    site: str,
    batch: Mapping[str, Tensor],
    n_cells: int,
    n_samples: int,
    shared: SharedDraws,
    *,
    worlds: Sequence[Mapping[str, Tensor]] = (),
    shares: Tensor | None = None,
    expected: str | None = None,
    resample: bool = False,
) -> Draws:
    """Draws of a site per cell and, with the same latent values, of the mean of an observed site's law.

    Parameters
    ----------
    model
        The model, in evaluation mode.
    site
        Local site, (n, g).
    batch
        Minibatch.
    n_cells
        Its number of cells.
    n_samples
        Draws, all in one pass where the model is `vectorized`; the caller bounds the memory by `n_cells`.
    shared
        What the minibatches of a pass share: the draws of global sites among them.
    worlds
        Arguments of the model replaced (not of the guide); the site is averaged over several. None: as is.
    shares
        (worlds, g) weights of that average, by feature; None for equal ones.
    expected
        Observed site of which to give the mean, with the arguments as they are, and the value.
    resample
        Draw each cell's values again among its own with their importance weights p(x, z) / q(z)
        (Rubin 1987's sampling importance resampling): of a model without global latent sites.

    Returns
    -------
    Draws
    """
    observed: Tensor | None = None
    values: list[Tensor] = []
    means: list[Tensor] = []
    weights: list[Tensor] = []
    if shared.chunk is None:
        shared.chunk = n_samples if model.vectorized else 1
    done, chunk = 0, shared.chunk
    while done < n_samples:
        guide_trace, trace = traces(model, batch, chunk, None, shared.values.get(done))
        if done not in shared.values:
            shared.values[done] = globals_of(guide_trace)
        nodes: Any = trace.nodes
        if worlds:
            latents = {n: s["value"] for n, s in nodes.items() if is_latent(s) and n not in model.recoded}
            total: Tensor | None = None
            for i, world in enumerate(worlds):
                other: Any = traces(model, batch, chunk, world, latents)[1].nodes
                here = site_value(other[site], chunk, True, n_cells, plate_nesting(model.elbo))
                here = here * (1 / len(worlds) if shares is None else shares[i].to(here))
                total = here if total is None else total + here
            assert total is not None
            values.append(total)
        else:
            values.append(site_value(nodes[site], chunk, True, n_cells, plate_nesting(model.elbo)))
        if expected is not None:
            node = {**nodes[expected], "value": nodes[expected]["fn"].mean}
            means.append(site_value(node, chunk, True, n_cells, plate_nesting(model.elbo)))
            observed = nodes[expected]["value"]
        if resample:
            if model.summed_out:
                latents = {n: s["value"] for n, s in guide_trace.nodes.items() if is_latent(s)}
                guide_trace, trace = traces(model, batch, chunk, None, latents, enumerate_model=True)
            weights.append(log_weights(guide_trace, trace, n_cells).expand(chunk, n_cells))
        done += chunk
        chunk = min(shared.chunk, n_samples - done)
    value = _joined(values)
    mean = _joined(means) if means else None
    if resample:
        chosen = torch.multinomial(torch.cat(weights).T.softmax(-1), n_samples, replacement=True).T
        at = chosen.unsqueeze(-1).expand_as(value)
        value, mean = value.gather(0, at), None if mean is None else mean.gather(0, at)
    return Draws(value, mean, observed)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
