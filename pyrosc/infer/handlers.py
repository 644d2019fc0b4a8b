"""Effect handlers: what changes about a model or guide while it runs, without changing its code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyrosc.data.schema import MAIN


def is_latent(site: Any) -> bool:
    """Whether a message or trace node is a latent sample site (not observed, not a plate)."""
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def is_observed(site: Any) -> bool:
    """Whether a trace node is an observed site with a likelihood (deterministic ones have none)."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not is_deterministic(site)
    )


def is_deterministic(site: Any) -> bool:
    """Whether a trace node comes from ``pyro.deterministic``."""
    return bool(site.get("infer", {}).get("_deterministic"))


def plates_of(site: Any) -> list[str]:
    """Names of the plates around a site."""
    return [frame.name for frame in site["cond_indep_stack"] if frame.vectorized]


def cells_plate(source: str = MAIN) -> str:
    """Name of the plate over the cells of a data source."""
    return "cells" if source == MAIN else f"cells_{source}"


def source_of(site: Any) -> str | None:
    """Data source to whose cells a trace node belongs; None for those outside of the plates over cells."""
    if site["type"] != "sample":
        return None
    plate = next((p for p in plates_of(site) if p.startswith("cells")), None)
    return MAIN if plate == "cells" else plate and plate.removeprefix("cells_")


def is_local(site: Any) -> bool:
    """Whether a trace node belongs to single cells."""
    return source_of(site) is not None


class Anneal(Messenger):
    """Scale the log-density of latent sites in model and guide alike: KL annealing.

    Parameters
    ----------
    weight
        Factor, from 0 (no KL) to 1 (the bound itself).
    sites
        Names of the sites, or of likelihood terms; None for every latent site.
    """

    def __init__(self, weight: float, sites: Collection[str] | None = None) -> None:
        super().__init__()
        self.weight, self.sites = weight, sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites if self.sites is not None else is_latent(msg):
            msg["scale"] = msg["scale"] * self.weight


class Measured(Messenger):
    """Leave features that the data lack out of the likelihood.

    At each site that observes a matrix of counts, the terms of the columns that were not measured are masked.

    Parameters
    ----------
    values
        By argument name of the model: the matrix (n, g) as the model gets it, and which columns were
        measured, (g,) bool.

    Attributes
    ----------
    sites
        Names of the sites found to observe each matrix.
    """

    def __init__(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.values = values
        self.sites: dict[str, set[str]] = {name: set() for name in values}

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if not is_observed(msg) or not isinstance(fn, Independent) or fn.base_dist.event_shape:
            return
        for name, (x, measured) in self.values.items():
            if msg["value"] is x or msg["name"] == name:
                base: Any = fn.base_dist
                msg["fn"] = base.mask(measured).to_event(fn.reinterpreted_batch_ndims)
                self.sites[name].add(msg["name"])


class Means(Messenger):
    """Replace each latent draw by the mean of its distribution; discrete ones by their mode.

    A transformed distribution without a known mean gives the image of its base's mean.

    Parameters
    ----------
    skip_enumerated
        Leave sites marked for enumeration to the enumerating handlers.
    """

    def __init__(self, skip_enumerated: bool = False) -> None:
        super().__init__()
        self.skip_enumerated = skip_enumerated

    def _pyro_sample(self, msg: Any) -> None:
        if not is_latent(msg) or msg["done"]:
            return
        if self.skip_enumerated and msg["infer"].get("enumerate"):
            return
        msg["value"], msg["done"] = _centre(msg["fn"]), True


def _centre(fn: Any) -> Tensor:
    if getattr(fn, "has_enumerate_support", False):
        return fn.mode
    try:
        return fn.mean
    except NotImplementedError:
        value = fn.base_dist.mean
        for transform in getattr(fn, "transforms", ()):
            value = transform(value)
        return value


class Fix(Messenger):
    """Give sites the values named, as draws (they stay latent)."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and is_latent(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Uncondition(Messenger):
    """Draw observed sites anew, but for deterministic ones."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_observed(msg):
            msg["is_observed"], msg["value"] = False, None


class Record(Messenger):
    """Collect the values of all sample sites, deterministic ones included, of the passes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Tensor] = {}

    def __enter__(self) -> Record:
        super().__enter__()
        return self

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.sites[msg["name"]] = msg["value"]


class RefuseParam(Messenger):
    """Refuse ``pyro.param`` and ``pyro.module``: parameters of a model are those of its nn.Module.

    Parameters
    ----------
    owner
        Name of the model, for the message.
    """

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner

    def _pyro_param(self, msg: Any) -> None:
        raise TypeError(
            f"{self.owner} uses pyro.param or pyro.module ('{msg['name']}'), which live in a global store; "
            "make it an nn.Parameter in __init__ (a positive one through .exp()), so that it is trained and "
            "saved with the model"
        )
