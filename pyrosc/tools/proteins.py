"""Proteins without noise, for any model that tells their background from their foreground."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrosc.data.errors import listed, warn
from pyrosc.data.inputs import as_if, as_rows, encode_do
from pyrosc.infer.posterior import stream
from pyrosc.infer.structure import need_site

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.data import Dataset
    from pyrosc.models.base import Model

#: Sites of a model of proteins: mean of the foreground, log mean of the background, P(foreground).
_FOREGROUND, _BACKGROUND, _PROBABILITY = "foreground_mean", "log_background", "foreground_probability"


def normalized_protein(
    model: Model,
    adata: AnnData | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    transform_batch: str | Sequence[str] | None = None,
    protein_list: Sequence[str] | None = None,
    include_protein_background: bool = False,
    sample_protein_mixing: bool = False,
    scale_protein: bool = False,
    n_samples: int = 0,
    return_mean: bool = True,
    as_numpy: bool = False,
    do: Mapping[str, Any] | None = None,
    batch_size: int = 512,
    seed: int = 0,
) -> pd.DataFrame | np.ndarray:
    """Proteins without noise, by default without background: mean foreground times its probability.

    The efficiency of a batch's staining is left out; what the decoder knows of the batch is not, so that to
    compare batches all cells are decoded under one (`transform_batch`).

    Parameters
    ----------
    model
        A model with the sites ``foreground_mean``, ``log_background`` and ``foreground_probability``.
    adata, indices
        Other cells, and which of them; as in `pyrosc.Model.posterior`.
    transform_batch
        Decode the cells as if of this batch; several are averaged. None: each cell's own batch but, for
        proteins that were not measured there, the mean over the batches where they were (after surgery:
        over those of the reference, where there are any).
    protein_list
        Proteins wanted, in this order; default all.
    include_protein_background
        Add mean background times its probability.
    sample_protein_mixing
        Draw which of the two a protein is, in place of weighing by the probability; needs `n_samples`.
    scale_protein
        Divide by the sum over all proteins: shares of a cell.
    n_samples
        Draws from the posterior; 0 decodes its mean.
    return_mean
        Average the draws; False gives an array (n_samples, n, p).
    as_numpy
        An array in place of a DataFrame.
    do
        Further what-if values, as in `pyrosc.Model.posterior`.
    batch_size, seed
        Cells at a time; seed of the draws.

    Returns
    -------
    pandas.DataFrame or numpy.ndarray
        (n, p) cells by proteins, float32.

    Raises
    ------
    KeyError
        If the model lacks a site, or a protein.
    """
    field, names = protein_field(model)
    if (sample_protein_mixing or not return_mean) and n_samples == 0:
        what = (
            "sample_protein_mixing=True draws"
            if sample_protein_mixing
            else "return_mean=False keeps the draws"
        )
        raise ValueError(f"{what}; ask for some: n_samples=25")
    chosen = _positions(names, protein_list)
    dataset = model.dataset(adata)
    rows = as_rows(indices, dataset)
    # shares are of whole cells, imputed proteins included: taken per draw, once all are there
    lead = (n_samples,) if (scale_protein and n_samples) or not return_mean else ()

    def value(found: dict[str, tuple[Tensor, bool]]) -> Tensor:
        foreground, log_b, p = (found[s][0] for s in (_FOREGROUND, _BACKGROUND, _PROBABILITY))
        if sample_protein_mixing:
            p = torch.bernoulli(p)
        out = foreground * p
        if include_protein_background:
            out = out + (1 - p) * log_b.exp()
        return out

    def decoded(which: np.ndarray, world: Mapping[str, Any]) -> np.ndarray:
        out = np.zeros((*lead, len(which), len(names)), np.float32)
        values = stream(
            model,
            [_FOREGROUND, _BACKGROUND, _PROBABILITY],
            model.batches(dataset, which, batch_size),
            n_samples=n_samples,
            reduce=None if n_samples else "mean",
            do=encode_do(model.registry, world, len(which)),
            seed=seed,
        )
        for at, found in values:
            here = value(found)
            here = here.mean(0) if n_samples and not lead else here
            out[..., at, :] = here.cpu().numpy()
        return out

    out = _of_batches(model, field, dataset, rows, transform_batch, do, decoded)
    if scale_protein:
        out = out / np.maximum(np.nansum(out, -1, keepdims=True), 1e-12)
    out = (out.mean(0) if lead and return_mean else out)[..., chosen]
    if as_numpy or not return_mean:
        return out
    return pd.DataFrame(out, index=dataset.obs_names[rows], columns=[names[i] for i in chosen])


def foreground_probability(
    model: Model,
    adata: AnnData | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    transform_batch: str | Sequence[str] | None = None,
    protein_list: Sequence[str] | None = None,
    n_samples: int = 0,
    do: Mapping[str, Any] | None = None,
    batch_size: int = 512,
    seed: int = 0,
) -> pd.DataFrame:
    """Probability that a protein's count is foreground, given the cell's latent space: cells by proteins.

    Parameters
    ----------
    model
        A model with the sites of `normalized_protein`.
    adata, indices, transform_batch, protein_list, n_samples, do, batch_size, seed
        As of `normalized_protein`; proteins that a cell's batch was not stained for are imputed likewise.

    Returns
    -------
    pandas.DataFrame
        (n, p) cells by proteins, float32.
    """
    field, names = protein_field(model)
    chosen = _positions(names, protein_list)
    dataset = model.dataset(adata)
    rows = as_rows(indices, dataset)

    def decoded(which: np.ndarray, world: Mapping[str, Any]) -> np.ndarray:
        out = np.zeros((len(which), len(names)), np.float32)
        values = stream(
            model,
            [_PROBABILITY],
            model.batches(dataset, which, batch_size),
            n_samples=n_samples,
            do=encode_do(model.registry, world, len(which)),
            seed=seed,
        )
        for at, found in values:
            out[at] = found[_PROBABILITY][0].cpu().numpy()
        return out

    out = _of_batches(model, field, dataset, rows, transform_batch, do, decoded)[:, chosen]
    return pd.DataFrame(out, index=dataset.obs_names[rows], columns=[names[i] for i in chosen])


def protein_field(model: Model) -> tuple[str, list[str]]:
    """Name of the protein field that the sites are of, and its proteins."""
    for site in (_FOREGROUND, _BACKGROUND, _PROBABILITY):
        need_site(model, site, "proteins without noise", None)
    field = next(n for n, s in model.registry.fields.items() if s.kind == "protein")
    return field, list(model.registry.var_names(field))


def panels(model: Model) -> np.ndarray:
    """Which proteins each batch was stained for, (batches, p) bool; of models that do not say, (0, 0)."""
    panel = getattr(model, "panel", None)
    return np.ones((0, 0), bool) if panel is None else panel.all_rows().detach().cpu().numpy() > 0.5


def _positions(names: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    if wanted is None:
        return list(range(len(names)))
    if isinstance(wanted, str):
        raise TypeError(f"protein_list takes a list of proteins; write ['{wanted}']")
    if absent := [w for w in wanted if w not in names]:
        raise KeyError(f"the model has no proteins {listed(absent)}; it has {listed(names, 20)}")
    return [list(names).index(w) for w in wanted]


def _of_batches(
    model: Model,
    field: str,
    dataset: Dataset,
    rows: np.ndarray,
    transform_batch: str | Sequence[str] | None,
    do: Mapping[str, Any] | None,
    decoded: Callable[[np.ndarray, Mapping[str, Any]], np.ndarray],
) -> np.ndarray:
    """What `decoded` gives as if of some batches, or of each cell's own with the rest imputed."""
    worlds = as_if(transform_batch, do)
    out = np.asarray(sum(decoded(rows, world) for world in worlds) / len(worlds))
    base = worlds[0]
    if "batch" in base:
        return out
    return _imputed(model, field, dataset, rows, out, lambda which, b: decoded(which, {**base, "batch": b}))


def _imputed(
    model: Model, field: str, dataset: Dataset, rows: np.ndarray, own: np.ndarray, decoded: Any
) -> np.ndarray:
    """Put in, for proteins that a cell's batch was not stained for, the mean over the batches that were."""
    measured = panels(model)
    if measured.all() or not model.registry.given("batch"):
        return own
    names = model.registry.categories("batch")
    codes = dataset.codes("batch")[rows]
    unknown = codes >= len(names)  # batches not seen, of models that are open to them
    lacking = np.where(unknown[:, None], False, ~measured[np.where(unknown, 0, codes)])
    which = np.flatnonzero(lacking.any(1))
    if not len(which):
        return own
    if never := [
        model.registry.var_names(field)[i] for i in np.flatnonzero(~measured.any(0) & lacking.any(0))
    ]:
        warn(
            f"no batch of the model was stained for {listed(never)}, of which nothing is known: they are NaN"
        )
    # of a model that surgery made, the reference's batches say what a cell would have, as they did before
    n_first = len(names) if model.surgery is None else model.surgery.fixed.get("panel", len(names))
    use_first = measured[:n_first].any(0)
    total = np.zeros((*own.shape[:-2], len(which), own.shape[-1]), np.float32)
    count = np.zeros((len(which), own.shape[-1]), np.float32)
    for s, name in enumerate(names):
        use = lacking[which] & measured[s] & (use_first if s < n_first else ~use_first)
        if use.any():
            total += np.where(use, decoded(rows[which], name), 0)
            count += use
    mine = lacking[which]
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    own[..., which, :] = np.where(mine, mean, own[..., which, :])
    return own
