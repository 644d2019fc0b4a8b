"""Several starting points, and the fit that explains held-out cells best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pyrosc.data import MAIN

if TYPE_CHECKING:
    from pyrosc.models.base import Model

_DRAWS = 50  # of the importance-weighted likelihood by which restarts are compared


def fit_restarts(model: Model, n_restarts: int, arguments: dict[str, Any]) -> Model:
    """`fit` from several starting points, on one split; the best one's weights and record are kept.

    The model's own starting values are the first. Fits are compared by the marginal likelihood of the
    held-out cells (`get_marginal_ll`), which prior densities are no part of: at a MAP estimate those may
    differ a lot between modes and say nothing about the data.

    Parameters
    ----------
    model
        Not trained yet; it is changed and returned. ``model.restarts`` holds the likelihoods.
    n_restarts
        Number of fits.
    arguments
        Of each fit.
    """
    if n_restarts < 1:
        raise ValueError(f"n_restarts is 1 or more, not {n_restarts}")
    if arguments["checkpoint"] is not None:
        raise ValueError("restarts are not checkpointed; leave out checkpoint= or n_restarts=")
    if model.history is not None:
        raise ValueError("restarts begin anew, and this model is trained already; make a new one")
    if model.surgery is not None:
        raise ValueError("a model of surgery starts where its reference ended; leave out n_restarts=")
    if list(model.registries) != [MAIN]:
        raise ValueError("n_restarts is for models of one data source")
    arguments = arguments | {"callbacks": list(arguments["callbacks"])}
    found: list[float] = []
    seed, best = arguments["seed"], model
    for i in tqdm(range(n_restarts), disable=not arguments["progress"], desc="restarts"):
        candidate = model if i == 0 else fresh(model, seed + i)
        candidate.fit(**arguments)
        held_out = candidate.validation_indices
        if not len(held_out):
            raise ValueError("restarts are compared on held-out cells, and none is held out: train_size=0.9")
        score = float(candidate.get_marginal_ll(indices=held_out, n_samples=_DRAWS, seed=seed))
        if not found or score > max(found):
            best = candidate
        found.append(score)
        arguments["train_size"] = None  # the split is that of the first fit
    if best is not model:
        model.load_state_dict(best.state_dict())
        model.history = best.history
    model.restarts = found
    return model


def fresh(model: Model, seed: int) -> Model:
    """The same model with starting weights drawn anew, for the same data, split and plan."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        again: Model = type(model)(model.registry, **model.config)
        again.datasets = model.datasets
        again.setup()
        again.initialize(model.datasets[MAIN])
    again.split, again.n_train, again.plan = model.split, dict(model.n_train), model.plan
    return again.eval()
