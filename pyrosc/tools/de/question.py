"""What is asked of which cells: arguments of `differential_expression` checked and put in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrosc.data import MAIN
from pyrosc.data.errors import DataError, listed
from pyrosc.data.inputs import as_rows
from pyrosc.infer.handlers import is_local, is_observed
from pyrosc.infer.structure import need_site, prototype
from pyrosc.tools.de.groups import Groups, from_column, from_masks

if TYPE_CHECKING:
    from pyrosc.data import Dataset
    from pyrosc.models.base import Model

#: Draws of a group mean by default, of which from the posterior: per cell, and where global sites are drawn.
_DRAWS, _SAMPLES, _SAMPLES_GLOBAL = 250, 10, 50


@dataclass(frozen=True)
class Modality:
    """A site of expression, and the counts behind it.

    Attributes
    ----------
    site
        Site of expression per cell and feature.
    field
        Field of the counts.
    counts
        Observed site whose law gives the counts' expectation, for calibration; None for none.
    mask
        Field that says which counts were measured; None where all were.
    """

    site: str
    field: str
    counts: str | None
    mask: str | None = None


def modalities(model: Model, calibrate: bool | None) -> list[Modality]:
    """What is compared: the sites of ``features``, or that of ``expression``.

    Raises
    ------
    KeyError
        If the model has no expression site.
    ValueError
        If the site is not per cell, or `calibrate` asks for what the model does not have.
    """
    if list(model.registries) != [MAIN]:
        raise ValueError(f"{type(model).__name__} reads several data sets; the groups are of cells of one")
    sites = list(model.features) or [model.expression]
    return [_modality(model, site, calibrate) for site in sites]


def _modality(model: Model, name: str, calibrate: bool | None) -> Modality:
    need_site(model, name, "differential expression", "expression")
    nodes: Any = prototype(model).nodes
    site = nodes[name]
    if not is_local(site):
        raise ValueError(f"site '{name}' is not in the plate over cells, so it has no group means")
    fields = {n: s for n, s in model.registry.fields.items() if s.kind == "counts"}
    if name in model.features:
        fields = {model.features[name]: model.registry.fields[model.features[name]]}
    if not fields:
        raise ValueError(f"{type(model).__name__} has no counts, of which groups of cells have statistics")
    width = site["value"].shape[-1]
    alike = [n for n in fields if len(fields[n].names) == width]
    if not alike:
        raise ValueError(
            f"site '{name}' has {width:,} values per cell, which are those of no field of counts "
            f"({', '.join(f'{n}: {len(s.names):,}' for n, s in fields.items())})"
        )
    reason = ""
    if alike[0] not in nodes or not is_observed(nodes[alike[0]]):
        reason = f"'{alike[0]}' is not an observed site"
    elif model.support().get(alike[0]) == "real":
        reason = "its likelihood is one of real numbers"
    elif not _has_mean(nodes[alike[0]]["fn"]):
        reason = f"the law of '{alike[0]}' has no mean in closed form"
    if calibrate and reason:
        raise ValueError(f"calibrate=True compares counts with what the model expects, but {reason}")
    states = model.registry.fields.items()
    mask = next((n for n, s in states if s.kind == "mask" and s.of == alike[0]), None)
    return Modality(name, alike[0], None if reason or calibrate is False else alike[0], mask)


def _has_mean(fn: Any) -> bool:
    try:
        return bool(np.isfinite(fn.mean.cpu().numpy()).all())
    except (NotImplementedError, AttributeError):
        return False


def cells_in_groups(
    dataset: Dataset,
    indices: Any,
    groupby: str | None,
    group1: Any,
    group2: Any,
    idx1: Any,
    idx2: Any,
    within: str | None,
) -> Groups:
    """Groups by a column, or by masks."""
    taking_part = np.zeros(dataset.n_obs, bool)
    taking_part[as_rows(indices, dataset)] = True
    if (groupby is None) == (idx1 is None):
        raise ValueError("name the groups by groupby='<column of obs>', or the cells by idx1= (and idx2=)")
    if groupby is not None:
        if idx2 is not None:
            raise ValueError("idx2= goes with idx1=; with groupby= the second group is group2=")
        return from_column(dataset.data, groupby, group1, group2, within, taking_part)
    if group1 is not None or group2 is not None or within is not None:
        raise ValueError("group1=, group2= and within= go with groupby=")
    return from_masks(dataset, idx1, idx2, taking_part)


def what_ifs(
    model: Model, batch_correction: bool, batches: Sequence[str] | None, do: Mapping[str, Any] | None
) -> tuple[dict[str, Any], ...]:
    """Worlds to average expression over: each batch in turn, with the other values of `do`."""
    given = dict(do or {})
    if not batch_correction:
        if batches is not None:
            raise ValueError(
                "batches= says which batches to average over; it goes with batch_correction=True"
            )
        return (given,) if given else ()
    fields = model.registry.fields
    if "batch" not in fields or not fields["batch"].given:
        raise ValueError(
            f"batch_correction=True decodes cells as if of each batch, but this {type(model).__name__} was "
            "made without batches; make it with batch_key=, or name another covariate in do="
        )
    if clash := {"batch", *fields["batch"].keys} & set(given):
        raise ValueError(f"do= sets {listed(clash)}, and so does batch_correction=True")
    known = model.registry.categories("batch")
    chosen = list(known) if batches is None else [batches] if isinstance(batches, str) else list(batches)
    if absent := [b for b in chosen if str(b) not in known]:
        raise DataError(f"the model has no batches {listed(absent)}; it has {listed(known, 20)}")
    if not chosen:
        raise ValueError("batches is empty; name some, or leave it out for all")
    return tuple({**given, "batch": b} for b in chosen)


def shares_of(
    dataset: Dataset, mask: str | None, worlds: Sequence[Mapping[str, Any]], batch_correction: bool
) -> torch.Tensor | None:
    """Weights of the worlds by feature: a batch that was not measured for a feature says nothing of it."""
    if mask is None or not batch_correction:
        return None
    codes, names = dataset.codes("batch"), dataset.registry.categories("batch")
    measured = dataset.codes(mask)
    rows = [measured[codes == names.index(str(w["batch"]))].any(0) for w in worlds]
    known = np.array(rows, np.float32)
    total = known.sum(0)
    return torch.from_numpy(
        np.where(total > 0, known / np.maximum(total, 1), 1 / len(rows)).astype(np.float32)
    )


def numbers_of_draws(model: Model, n_samples: int | None, n_bootstrap: int | None) -> tuple[int, int]:
    """Draws from the posterior, and bootstrap weights for each."""
    for name, value in {"n_samples": n_samples, "n_bootstrap": n_bootstrap}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is at least 1; not {value}")
    k = n_samples or (_SAMPLES_GLOBAL if model.latent_sites(local=False) else _SAMPLES)
    b = n_bootstrap or -(-_DRAWS // k)
    if k * b < 2:
        raise ValueError("n_samples × n_bootstrap is the number of draws; take two or more")
    return k, b
