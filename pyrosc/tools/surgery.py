"""Reference-query surgery: a trained model learns new batches and forgets nothing (scArches)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyrosc.data import MAIN, DataError, Dataset, Registry, preflight
from pyrosc.data.encode import part
from pyrosc.data.errors import listed, one_of, warn
from pyrosc.data.inputs import dummy_batch
from pyrosc.infer.handlers import Measured, is_latent, is_local
from pyrosc.nn import CategoryTable

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model

#: Share of the reference's genes below which the user is told.
_OVERLAP = 0.8
_TINY = 1e-12  # rows that are all the same have no spread
#: How the query trains: few numbers move, so that few steps are enough, at a higher rate.
_PLAN: dict[str, Any] = {
    "steps": 150,
    "min_epochs": 10,
    "max_epochs": 75,
    "lr": 2e-2,
    "warmup": 0.0,
    "weight_decay": 0.0,
}


@dataclass(frozen=True)
class Surgery:
    """What a model keeps of its reference.

    Attributes
    ----------
    fixed
        By name of each table of categories, how many of its rows are the reference's.
    free
        Names of submodules and parameters that train beside the new rows.
    missing_genes
        Whether genes that cells lack are left out of their likelihood (``"mask"``, and with the reference's
        mean for the encoder ``"mean"``) or zero counts (``"zero"``).
    shrinkage
        Weight of the prior of the new rows; 0 for none.
    """

    fixed: Mapping[str, int]
    free: tuple[str, ...] = ()
    missing_genes: str = "mask"
    shrinkage: float = 1.0

    @property
    def masks(self) -> bool:
        """Whether genes that cells lack are left out of their likelihood."""
        return self.missing_genes != "zero"

    @staticmethod
    def mean_of(field: str) -> str:
        """Name of the model's buffer with the reference's mean of a counts field."""
        return f"_mean_of_{field}"

    def apply(self, model: Model) -> None:
        """Make the new rows, and what is free, all that trains."""
        if self.missing_genes == "mean":
            for field, state in model.registry.fields.items():
                if state.missing:
                    mean = torch.tensor(state.means, device=model.device)
                    model.register_buffer(self.mean_of(field), mean, persistent=False)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        for name, n in self.fixed.items():
            _table(model, name).fix(n)
        for name, parameter in model.named_parameters():
            table, _, last = name.rpartition(".")
            added = last == "added" and table in self.fixed
            was_trainable = parameter.requires_grad if added else name in trainable
            parameter.requires_grad_(was_trainable and (added or self.frees(name)))
        model.surgery = self

    def frees(self, name: str) -> bool:
        """Whether a submodule or parameter is among those that train beside the new rows."""
        return any(name == f or name.startswith(f + ".") for f in self.free)

    def keep_still(self, model: Model) -> None:
        """While the query trains: no dropout, no moving averages in what is the reference's."""
        for name, module in model.named_modules():
            if name and not self.frees(name):
                module.training = False

    def penalty(self, model: Model) -> Tensor | float:
        """Minus log-density of the new rows under their prior, in nats for all of them, times its weight.

        In each table they are Normal, about the mean of the reference's rows and as far from it as those are:
        a batch is one of many. Without it, directions of the latent space in which the query may be shifted
        at hardly any cost, since encoder and decoder can make up for one another, are left to chance.
        """
        total: Tensor | float = 0.0
        for name in self.fixed if self.shrinkage else ():
            table = _table(model, name)
            if table.added is not None and table.added.requires_grad:
                rows = table.rows.detach()
                centre = rows.mean(0)
                variance = rows.var(0).mean() if len(rows) > 1 else rows.square().mean()
                total = total + (table.added - centre).square().sum() / (2 * variance + _TINY)
        return self.shrinkage * total

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"fixed": dict(self.fixed)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Surgery:
        """Inverse of `to_dict`."""
        return cls(**(dict(values) | {"free": tuple(values["free"])}))


def surgery(
    model: Model,
    query: AnnData,
    *,
    free: Sequence[str] = (),
    labels: bool = False,
    decoder_only: bool = False,
    missing_genes: Literal["mask", "mean", "zero"] = "mask",
    shrinkage: float = 1.0,
) -> Model:
    """A copy of a trained model that learns the new batches of query cells, with all else as it was.

    New categories of the batch and of any categorical covariate get rows of their own in each table; these
    rows are all that trains. What the reference's cells are mapped to does not move, bit for bit, so that
    reference and query share one latent space.

    Parameters
    ----------
    model
        Trained model of one data source; it is left alone. One that came from surgery itself will do.
    query
        Cells with the columns of ``obs`` (and layer) that the model was made with; never changed. Genes are
        matched by name, in any order; extra ones are left out.
    free
        Names of submodules or parameters that train too, such as ``"encoder"``; the reference's latent
        space then moves.
    labels
        Use the labels of the query, where the model reads labels; those of types that it does not know are
        taken as unlabelled. False takes all cells as unlabelled.
    decoder_only
        Go on where the guide does not see the new categories (``encode_covariates=False``), so that only
        the decoder adapts and the query's latent space is that of the reference's encoder.
    missing_genes
        What becomes of genes of the model that the query lacks. ``"mask"``: they are left out of the
        likelihood, and the encoder sees zeros. ``"mean"``: they are left out of the likelihood, and the
        encoder sees the mean of the reference's cells at the depth of each cell. ``"zero"``: they are zero
        counts, as in scvi-tools.
    shrinkage
        Weight of the prior that holds the new rows to the reference's (`Surgery.penalty`); 0 for none.

    Returns
    -------
    Model
        Of the model's class, to be trained by `fit`, with a plan of its own: 150 steps, at a higher rate.

    Raises
    ------
    ValueError
        If there is nothing to learn: no new category, or none that the guide sees.
    DataError
        If the query lacks a column, or shares no gene with the model.

    References
    ----------
    Lotfollahi et al. Mapping single-cell data to reference atlases by transfer learning. Nature
    Biotechnology 40 (2022).
    """
    if not hasattr(model, "registries") or not hasattr(query, "obs_names"):
        raise TypeError(
            "surgery takes a trained model and an AnnData of the query; a saved reference is given to "
            "SCVI.from_reference(folder, query)"
        )
    name = type(model).__name__
    _check(model, name, missing_genes, shrinkage)
    before = model.registry
    _check_genes(before, query, name, missing_genes)
    registry = before.extend(query, labels=labels, missing=True)
    dataset = Dataset(query, registry, name)
    grown = _new_categories(before, registry)
    free = (free,) if isinstance(free, str) else tuple(free)
    if not grown and not free:
        raise ValueError(
            f"the query has no category that {name} does not know already ({_categories(before)}); there is "
            "nothing to learn: pass it to the methods of the model as adata=, or name what else should train "
            "by free="
        )
    with torch.random.fork_rng():
        new: Model = type(model)(registry.with_fingerprints(dataset.fingerprints()), **model.config)
        new.datasets = {MAIN: dataset}
        new.setup().eval()  # what is tried out below moves no average
    preflight(dataset, new.support(), query=True)
    if strange := [f for f in free if not any(k == f or k.startswith(f + ".") for k in new.state_dict())]:
        raise ValueError(
            f"{name} has no part {listed(strange)} to free; it has "
            f"{listed(sorted({k.split('.')[0] for k in new.state_dict()}), 20)}"
        )
    if missing_genes == "mean":
        _check_means(registry, name)
    fixed = _carry_over(model, new, name)
    kept = Surgery(fixed, free, missing_genes, shrinkage)
    kept.apply(new)
    new.initialize_query(dataset)
    new.to(model.device)
    if kept.masks:
        _check_masked(new, dataset)
    if not decoder_only and not free and not _guide_adapts(new):
        raise ValueError(_cannot_adapt(model, name, grown))
    new.plan = replace(model.plan, **_PLAN)
    return new


def _check(model: Model, name: str, missing_genes: str, shrinkage: float) -> None:
    one_of("missing_genes", missing_genes, ("mask", "mean", "zero"))
    if missing_genes == "mean" and not model.takes_means:
        raise ValueError(
            f"the encoder of {name} does not take means of counts in place of counts; leave "
            "missing_genes='mask'"
        )
    if shrinkage < 0:
        raise ValueError(f"shrinkage is 0 or more, not {shrinkage}")
    if list(model.registries) != [MAIN]:
        raise ValueError(f"surgery is for models of one data source; {name} reads {sorted(model.registries)}")
    if not model.trained:
        raise ValueError(f"this {name} is not trained; fit it on the reference first")
    if model.knows_cells:
        raise ValueError(
            f"{name} has parameters of its own for each cell, and none for cells of a query; make a new "
            "model of them"
        )
    if not any(s.given and s.kind in ("categorical", "categoricals") for s in model.registry.fields.values()):
        raise ValueError(
            f"this {name} was made without a batch or categorical covariate, so that a query brings nothing "
            "that it could learn: make the reference with batch_key=, or pass the query to the methods of "
            "the model as adata="
        )


def _check_genes(registry: Registry, query: Any, name: str, missing_genes: str) -> None:
    for field, state in registry.fields.items():
        if state.kind != "counts":
            continue
        has = set(map(str, part(query, state.modality).var_names))
        absent = [g for g in state.names if g not in has]
        shared = len(state.names) - len(absent)
        folded = {g.casefold(): g for g in has}
        other_case = {g: folded[g.casefold()] for g in absent if g.casefold() in folded}
        if len(other_case) > shared:
            pairs = [f"'{theirs}' for '{ours}'" for ours, theirs in list(other_case.items())[:3]]
            raise DataError(
                f"the query has {len(other_case):,} of the {len(state.names):,} genes of {name} in another "
                f"case ({', '.join(pairs)}), and {shared:,} as they are: is it of another species? Rename "
                "query.var_names if the genes are the same"
            )
        if shared == 0:
            raise DataError(
                f"the query has none of the {len(state.names):,} genes of {name}'s '{field}' (such as "
                f"{listed(state.names[:3], 3)}; the query has {listed(sorted(has)[:3], 3)}). Genes are "
                "matched by var_names: are all symbols, or all Ensembl ids?"
            )
        if shared < _OVERLAP * len(state.names):
            warn(
                f"the query has {shared:,} of the {len(state.names):,} genes of {name} "
                f"({shared / len(state.names):.0%}); missing are {listed(absent)}. The encoder takes them as "
                f"{'the mean' if missing_genes == 'mean' else 'zero'}, and where many are missing it may map "
                "cells to the wrong place: prefer a reference of shared genes"
            )


def _check_means(registry: Registry, name: str) -> None:
    for field, state in registry.fields.items():
        if not state.missing:
            continue
        if not state.means:
            raise ValueError(
                f"this {name} does not know the mean of its genes ('{field}'): it was saved by an earlier "
                "version or converted without its cells; make it from them, or leave missing_genes='mask'"
            )
        lacks = set(state.missing)
        if not sum(m for n, m in zip(state.names, state.means, strict=True) if n not in lacks):
            raise DataError(
                f"the reference of {name} has no counts in any gene that the query has ('{field}'), so that "
                "the depth of the query's cells is not known; leave missing_genes='mask'"
            )


def _new_categories(before: Registry, after: Registry) -> dict[str, list[str]]:
    """Categories that the query brings, by column."""
    found = {}
    for name, state in after.fields.items():
        for key, old, new in zip(state.keys, before.fields[name].categories, state.categories, strict=False):
            if len(new) > len(old):
                found[key] = list(new[len(old) :])
    return found


def _categories(registry: Registry) -> str:
    parts = [
        f"obs['{key}']: {listed(names, 8)}"
        for state in registry.fields.values()
        if state.kind in ("categorical", "categoricals")
        for key, names in zip(state.keys, state.categories, strict=False)
    ]
    return "; ".join(parts)


def _carry_over(model: Model, new: Model, name: str) -> dict[str, int]:
    """Copy all weights; new rows start at the mean of those there are. Returns the number of old rows."""
    values, state = model.state_dict(), new.state_dict()
    fixed: dict[str, int] = {}
    for path, table in new.named_modules():
        if isinstance(table, CategoryTable):
            rows = values[f"{path}.rows"]
            fixed[path] = len(rows)
            more = rows.mean(0, keepdim=True).expand(table.n_categories - len(rows), *rows.shape[1:])
            values[f"{path}.rows"] = torch.cat([rows, more])
    if bad := sorted(k for k in state if k not in values or values[k].shape != state[k].shape):
        raise ValueError(
            f"the shape of {listed(bad)} of {name} follows the number of categories, and surgery extends "
            "only rows of a CategoryTable; keep such numbers in one (pyrosc.nn.CategoryTable)"
        )
    new.load_state_dict(values)
    return fixed


def _check_masked(model: Model, dataset: Dataset) -> None:
    """Whether the sites that observe counts with missing genes can leave them out."""
    if not dataset.present:
        return
    batch = dummy_batch(model.registries, model.device)
    measured = Measured({n: (batch[n], which) for n, which in dataset.present.items()})
    with torch.random.fork_rng(), torch.no_grad(), poutine.block(), model.minibatch(batch), measured:
        model.model(**model.inputs(batch))
    if unseen := [n for n, sites in measured.sites.items() if not sites]:
        raise DataError(
            f"the query lacks genes, and no site of {type(model).__name__} observes {listed(unseen)} gene by "
            "gene (a law in .to_event(1)) from which they could be left out; pass missing_genes='zero' to "
            "take them as zero counts, or a query with all genes"
        )


def _guide_adapts(model: Model) -> bool:
    """Whether what trains moves the guide's local sites."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    batch = dummy_batch(model.registries, model.device)
    with torch.random.fork_rng(), torch.enable_grad(), model.minibatch(batch):
        nodes: Any = poutine.trace(model.guided).get_trace(**model.inputs(batch)).nodes
    values = [s["value"] for s in nodes.values() if is_latent(s) and is_local(s) and s["value"].requires_grad]
    if not values or not trainable:
        return False
    total = torch.stack([v.sum() for v in values]).sum()
    return any(g is not None for g in torch.autograd.grad(total, trainable, allow_unused=True))


def _cannot_adapt(model: Model, name: str, grown: Mapping[str, Sequence[str]]) -> str:
    how = (
        "make the reference with encode_covariates=True"
        if "encode_covariates" in model.config
        else "let its guide take the batch"
    )
    what = "; ".join(f"obs['{key}']: {listed(new)}" for key, new in grown.items()) or "nothing new"
    return (
        f"the guide of this {name} does not see the batch, so that the query's new categories ({what}) "
        f"cannot move its latent space: {how}, or pass decoder_only=True to train the decoder's rows alone, "
        "or free= to train more"
    )


def _table(model: Model, name: str) -> CategoryTable:
    table = model.get_submodule(name)
    assert isinstance(table, CategoryTable)
    return table


__all__ = ["Surgery", "surgery"]
