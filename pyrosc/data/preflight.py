"""Checks before any training: what is wrong with the data, where, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyrosc.data import encode as enc
from pyrosc.data.dataset import Dataset
from pyrosc.data.errors import DataError, listed, warn
from pyrosc.data.matrix import CountSummary, Matrix, summarize
from pyrosc.data.state import FieldState

#: A standardised covariate further out than this is likely an error in the table.
_WILD = 30.0
_MANY_GENES = 10_000
_FEW_PROTEINS = 5
#: Names of antibodies that bind nothing: "isotype", or an immunoglobulin's class by itself ("IgG2a_control").
_ISOTYPE = re.compile(
    r"isotype|\b(mouse|rat|hamster)?[ _-]*ig[gm]\d?[abc]?\b|_?ig[gm]\d?[abc]?[ _-]*(control|ctrl)", re.I
)


def preflight(dataset: Dataset, support: Mapping[str, str] | None = None, *, query: bool = False) -> None:
    """Check the data of a model.

    Parameters
    ----------
    dataset
        Cells to check.
    support
        What a model takes per counts field: ``"counts"`` (whole numbers from 0; the default), ``"panel"``
        (the same of a few genes, of which a cell may have none), or ``"real"``.
    query
        Whether the cells are new ones for a trained model: only errors matter then, since the
        warnings are about what can be learned.

    Raises
    ------
    DataError
        Naming the column or matrix, the first cells or genes, and the remedy.

    Warns
    -----
    DataWarning
        For data that are usable but likely not what was meant.
    """
    support = dict(support or {})
    for name, state in dataset.registry.fields.items():
        if state.kind == "counts":
            adata = enc.part(dataset.data, state.modality)
            _names(adata, state)
            _counts(dataset, adata, name, state, support.get(name, "counts"), query)
        elif state.given and state.kind in ("continuous", "continuouses", "size_factor"):
            _continuous(dataset, state, query)
        elif state.kind == "total":
            _total(dataset, name, state, query)
        elif state.given and state.kind in ("categorical", "categoricals") and not query:
            _categories(dataset, name, state)
        elif state.given and state.kind == "labels" and not query:
            _labels(dataset, name, state)
        elif state.given and state.kind == "values":
            _values(dataset, name, state)
        elif state.given and state.kind == "protein":
            _protein(dataset, name, state, query)


def _names(adata: Any, state: FieldState) -> None:
    if len(set(state.names)) < len(state.names):
        twice = adata.var_names[adata.var_names.duplicated()]
        raise DataError(f"var_names are not unique ({listed(twice)}); call adata.var_names_make_unique()")


def _counts(dataset: Dataset, adata: Any, name: str, state: FieldState, support: str, query: bool) -> None:
    summary = dataset.summary(name)
    cells, genes, where = adata.obs_names, state.names, state.where
    if summary.n_nonfinite:
        raise DataError(
            f"{where} holds {summary.n_nonfinite:,} values that are NaN or infinite "
            f"({_example(summary, 'nonfinite', cells, genes)}); counts must be finite"
        )
    if support == "real":
        return
    for kind, n in (("negative", summary.n_negative), ("fractional", summary.n_fractional)):
        if n:
            raise DataError(
                f"{where} does not hold counts: {n / max(summary.n_values, 1):.1%} of its non-zero values "
                f"are {kind} ({_example(summary, kind, cells, genes)}). {_where_counts_are(adata, state)}"
            )
    if support != "panel":
        _empty(summary.cell_sums, cells, where)
    if query:
        return
    silent = np.flatnonzero(summary.gene_sums == 0)
    if len(silent):
        warn(
            f"{len(silent):,} of {len(genes):,} genes have no counts in {where} (first: "
            f"{listed([genes[i] for i in silent[:3]], 3)}); nothing can be learned about them: "
            "sc.pp.filter_genes(adata, min_cells=1) removes them"
        )
    if len(genes) > _MANY_GENES:
        warn(
            f"{len(genes):,} genes: training time grows with their number, and 2,000-4,000 variable genes "
            f"mostly do as well (sc.pp.highly_variable_genes(flavor='seurat_v3')); as they are, expect about "
            f"{len(genes) / 4000:.0f} times the time of 4,000 genes"
        )


def _empty(totals: np.ndarray, cells: Any, where: str) -> None:
    empty = totals == 0
    if empty.any():
        raise DataError(
            f"{int(empty.sum()):,} cells have no counts in {where} (first: {listed(cells[empty], 3)}); "
            "remove them, for example with sc.pp.filter_cells(adata, min_counts=1)"
        )


def _total(dataset: Dataset, name: str, state: FieldState, query: bool) -> None:
    _empty(dataset.codes(name), dataset.obs_names, state.where)
    n_genes = int(enc.part(dataset.data, state.modality).n_vars)
    if query and 2 * n_genes < state.n_summed:
        warn(
            f"{state.where} has {n_genes:,} genes, {dataset.owner} was made with {state.n_summed:,}: total "
            "counts, and what is computed from them, are not comparable; pass these cells with all genes"
        )


def _example(summary: CountSummary, kind: str, cells: Any, genes: tuple[str, ...]) -> str:
    row, col, value = summary.examples[kind]
    return f"for example {value:g} in cell '{cells[row]}', gene '{genes[col]}'"


def _where_counts_are(adata: Any, state: FieldState) -> str:
    candidates = {f"layer='{k}'": v for k, v in adata.layers.items() if k not in state.keys}
    if state.keys and adata.X is not None:
        candidates["layer=None (X)"] = adata.X
    good = [how for how, matrix in candidates.items() if _looks_like_counts(matrix)]
    if good:
        return f"Counts seem to be in {' or '.join(good)}"
    raw = getattr(adata, "raw", None)
    if raw is not None and _looks_like_counts(raw.X):
        return "Counts seem to be in adata.raw: adata.layers['counts'] = adata.raw[:, adata.var_names].X"
    return "Raw counts are needed; estimated (expected) counts can be rounded into a layer of their own"


def _looks_like_counts(matrix: Any) -> bool:
    head = matrix[: min(matrix.shape[0], 200)]
    return summarize(Matrix(head)).are_counts


def _continuous(dataset: Dataset, state: FieldState, query: bool) -> None:
    adata = enc.part(dataset.data, state.modality)
    for i, key in enumerate(state.keys):
        raw = enc.numbers(adata, key)
        bad = ~np.isfinite(raw)
        if bad.any():
            raise DataError(
                f"obs['{key}'] is NaN or infinite for {int(bad.sum()):,} cells (first: "
                f"{listed(adata.obs_names[bad], 3)}); fill it in or leave these cells out"
            )
        if state.kind == "size_factor":
            low = raw <= 0
            if low.any():
                raise DataError(
                    f"obs['{key}'] must be positive; it is not for {int(low.sum()):,} cells (first: "
                    f"{listed(adata.obs_names[low], 3)})"
                )
        if query or state.kind == "size_factor":
            continue
        if np.ptp(raw) == 0:
            warn(f"obs['{key}'] is {raw[0]:g} for every cell; as a covariate it does nothing")
        values = np.abs((raw - state.loc[i]) / state.scale[i])
        if values.max() > _WILD:
            worst = int(values.argmax())
            warn(
                f"obs['{key}'] has a wild scale: {raw[worst]:g} in cell '{adata.obs_names[worst]}' is "
                f"{values[worst]:.0f} units from the centre; take logarithms, clip it, or leave "
                "standardize=True"
            )


def _categories(dataset: Dataset, name: str, state: FieldState) -> None:
    codes = dataset.codes(name).reshape(dataset.n_obs, -1)
    for i, (key, categories) in enumerate(zip(state.keys, state.categories, strict=True)):
        if len(categories) == 1:
            warn(f"obs['{key}'] is '{categories[0]}' for every cell; as a covariate it does nothing")
            continue
        counts = np.bincount(codes[:, i], minlength=len(categories))
        single = [c for c, n in zip(categories, counts, strict=True) if n == 1]
        if len(categories) > 2 and counts.max() == 1:
            raise DataError(
                f"obs['{key}'] has a category of its own for every cell; it looks like a cell name, not a "
                "covariate"
            )
        if single:
            warn(
                f"obs['{key}'] has {len(single):,} categories with a single cell ({listed(single)}); their "
                "effect cannot be told from that cell: merge or remove them"
            )


def _labels(dataset: Dataset, name: str, state: FieldState) -> None:
    codes = dataset.codes(name)
    if (codes < 0).all():
        raise DataError(f"obs['{state.keys[0]}'] labels no cell")
    missing = int(enc.column(enc.part(dataset.data, state.modality), state.keys[0]).isna().sum())
    if missing:
        warn(
            f"{missing:,} of {dataset.n_obs:,} cells have no label in obs['{state.keys[0]}'] and are taken "
            "as unlabelled"
        )


def _values(dataset: Dataset, name: str, state: FieldState) -> None:
    bad = ~np.isfinite(dataset.codes(name)).all(axis=1)
    if bad.any():
        raise DataError(
            f"{state.where} is NaN or infinite for {int(bad.sum()):,} cells (first: "
            f"{listed(dataset.obs_names[bad], 3)})"
        )


def _protein(dataset: Dataset, name: str, state: FieldState, query: bool) -> None:
    values = dataset.codes(name)
    cells, where = dataset.obs_names, state.where
    mask = next((n for n, s in dataset.registry.fields.items() if s.kind == "mask" and s.of == name), None)
    if mask is None and np.isnan(values).any():
        lacking = np.isnan(values).any(axis=1)
        raise DataError(
            f"{where} is NaN in {int(lacking.sum()):,} cells (first: {listed(cells[lacking], 3)}), and "
            f"{dataset.owner} does not know which proteins were measured: give it an argument of "
            "ProteinMask, or leave these cells out"
        )
    for what, bad, remedy in (
        ("is infinite", np.isinf(values), "counts are finite; NaN says not measured"),
        (
            "does not hold counts",
            (values < 0) | (values != np.floor(values)),
            "raw counts are needed, not CLR",
        ),
    ):
        if bad.any():
            row, col = np.argwhere(bad)[0]
            raise DataError(
                f"{where} {what}: {values[row, col]:g} in cell '{cells[row]}', protein '{state.names[col]}'; "
                f"{remedy}"
            )
    if query:
        return
    if mask is not None:
        measured = dataset.codes(mask).sum(axis=0) > 0
        if not measured.any():
            raise DataError(f"{where} holds no counts above zero: no protein was measured in any cell")
        if not measured.all():
            absent = [n for n, m in zip(state.names, measured, strict=True) if not m]
            warn(
                f"{len(absent)} proteins of {where} were measured in no cell: {listed(absent)}; leave them "
                "out"
            )
    if len(state.names) < _FEW_PROTEINS:
        warn(
            f"{where} has {len(state.names)} proteins; with fewer than {_FEW_PROTEINS}, background and "
            "foreground are hard to tell apart, and what is said of them is uncertain"
        )
    if controls := [n for n in state.names if _ISOTYPE.search(n)]:
        warn(
            f"{where} has isotype controls ({listed(controls)}), which are modelled as any protein; all of "
            "their counts are background, so that a foreground found in them shows what is not to be believed"
        )
