"""Which cells are compared with which, and whether they are replicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pyrosc.data.encode import category_names, category_order, column, encode
from pyrosc.data.errors import DataError, listed, warn
from pyrosc.data.inputs import as_rows

FEWEST = 3  # cells of a group that is compared

#: Columns of ``obs`` whose categories are likely replicates, by name without case and separators.
_DONORS = (
    *("donor", "donorid", "patient", "patientid", "subject", "subjectid", "individual", "individualid"),
    *(
        "sample",
        "sampleid",
        "mouse",
        "mouseid",
        "animal",
        "animalid",
        "replicate",
        "origident",
        "participant",
    ),
)


@dataclass(frozen=True)
class Comparison:
    """Groups `first` (positions) against groups `second`."""

    name: str
    group1: str
    group2: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    within: str | None = None


@dataclass(frozen=True)
class Groups:
    """Groups of cells and what is compared.

    Attributes
    ----------
    codes
        (n,) group of each cell; -1 for cells that take no part.
    names
        Of the groups.
    comparisons
        What is compared.
    key, within
        Columns of ``obs`` that the groups come from; None for masks.
    markers
        Whether each group is compared with the rest of several, in search of what marks it.
    """

    codes: np.ndarray
    names: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    key: str | None = None
    within: str | None = None
    markers: bool = False

    def rows(self, group: int) -> np.ndarray:
        """Rows of the cells of a group."""
        return np.flatnonzero(self.codes == group)

    def used(self) -> list[int]:
        """Groups that take part in some comparison."""
        return sorted({g for c in self.comparisons for g in (*c.first, *c.second)})


def from_column(
    obs: Any,
    groupby: str,
    group1: str | Sequence[str] | None,
    group2: str | Sequence[str] | None,
    within: str | None,
    taking_part: np.ndarray,
) -> Groups:
    """Groups by the categories of a column of ``obs``; cells without one are left out.

    Parameters
    ----------
    obs
        AnnData whose ``obs`` holds the columns.
    groupby, group1, group2, within
        As of `differential_expression`.
    taking_part
        (n,) boolean: the cells to take.
    """
    categories, codes = _codes(obs, groupby, taking_part)
    if len(categories) < 2 and group2 is None:
        raise DataError(
            f"obs['{groupby}'] has one group only ({listed(categories) or 'none'}) among the cells taken; "
            "there is nothing to compare it with"
        )
    ones = _named(group1, categories, groupby) or list(range(len(categories)))
    twos = _named(group2, categories, groupby)
    if shared := sorted(set(ones) & set(twos)):
        raise DataError(f"{listed(categories[i] for i in shared)} is in group1 and in group2")
    strata: list[str | None] = [None]
    layer = np.zeros(len(codes), np.int64)
    if within is not None:
        if within == groupby:
            raise ValueError(f"within= and groupby= are both '{within}'")
        names, layer = _codes(obs, within, taking_part)
        strata = list(names)
    k = len(categories)
    combined = np.where((codes >= 0) & (layer >= 0), layer * k + codes, -1)
    sizes = np.bincount(combined[combined >= 0], minlength=k * len(strata))
    comparisons, too_few = [], []
    for s, stratum in enumerate(strata):
        for i in ones:
            others = twos or [j for j in range(k) if j != i]
            first = (s * k + i,)
            second = tuple(s * k + j for j in others if sizes[s * k + j])
            label = "rest" if not twos else " + ".join(categories[j] for j in others)
            place = "" if stratum is None else f" in {stratum}"
            name = f"{categories[i]} vs {label}{place}"
            if min(int(sizes[list(first)].sum()), int(sizes[list(second)].sum())) < FEWEST:
                too_few.append(name)
            else:
                comparisons.append(Comparison(name, categories[i], label, first, second, stratum))
    if too_few and ((group1 is not None and within is None) or not comparisons):
        raise DataError(f"{listed(too_few)}: a group has fewer than {FEWEST} cells")
    if too_few:
        warn(f"left out, since a group has fewer than {FEWEST} cells: {listed(too_few)}")
    markers = not twos and within is None and k > 2
    labels = [c if s is None else f"{c} in {s}" for s in strata for c in categories]
    return Groups(combined, tuple(labels), tuple(comparisons), groupby, within, markers)


def from_masks(dataset: Any, idx1: Any, idx2: Any, taking_part: np.ndarray) -> Groups:
    """Two groups by positions or boolean masks; without the second it is the rest of the cells."""
    one = np.zeros(dataset.n_obs, bool)
    one[as_rows(idx1, dataset)] = True
    if idx2 is None:
        two = taking_part & ~one
    else:
        two = np.zeros(dataset.n_obs, bool)
        two[as_rows(idx2, dataset)] = True
    one, two = one & taking_part, two & taking_part
    if both := int((one & two).sum()):
        raise DataError(f"{both:,} cells are in idx1 and in idx2; a cell can be in one group only")
    other = "rest" if idx2 is None else "group2"
    for name, mask in {"idx1": one, "idx2" if idx2 is not None else "the rest": two}.items():
        if mask.sum() < FEWEST:
            raise DataError(f"{name} has {mask.sum()} cells; a group has at least {FEWEST}")
    codes = np.where(one, 0, np.where(two, 1, -1))
    compared = Comparison(f"group1 vs {other}", "group1", other, (0,), (1,))
    return Groups(codes, ("group1", other), (compared,), markers=idx2 is None)


def _codes(adata: Any, key: str, taking_part: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Categories in use and codes of the cells; -1 where missing or not taking part."""
    values = column(adata, key)
    if pd.api.types.is_float_dtype(values.dtype) and values.nunique() > 50:
        raise DataError(f"obs['{key}'] holds {values.nunique():,} different numbers; groups are categories")
    categories = category_order(values[taking_part])
    codes = encode(category_names(values), categories)
    codes[~taking_part] = -1
    return categories, codes


def _named(wanted: str | Sequence[str] | None, categories: tuple[str, ...], key: str) -> list[int]:
    """Positions of named categories; none for None."""
    if wanted is None:
        return []
    several = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Sequence) else wanted
    names = list(dict.fromkeys(str(n) for n in several))
    if absent := [n for n in names if n not in categories]:
        raise DataError(
            f"obs['{key}'] has no group {listed(absent)} among the cells taken; it has "
            f"{listed(categories, 20)}"
        )
    if not names:
        raise ValueError("group1 and group2 name at least one group; leave them out for all")
    return [categories.index(n) for n in names]


@dataclass(frozen=True)
class Donors:
    """Donor of each cell, (n,) codes, with their names."""

    key: str
    codes: np.ndarray
    names: tuple[str, ...]


def donors_of(adata: Any, key: str, groups: Groups) -> Donors:
    """Donors by a column of ``obs``; every side of every comparison needs three or more.

    Raises
    ------
    DataError
        If a cell has no donor, or a side has fewer than three.
    """
    part = groups.codes >= 0
    names, codes = _codes(adata, key, part)
    if missing := int((codes[part] < 0).sum()):
        raise DataError(f"obs['{key}'] is missing for {missing:,} of the cells compared; leave them out")
    for c in groups.comparisons:
        for label, side in ((c.group1, c.first), (c.group2, c.second)):
            n = len(np.unique(codes[np.isin(groups.codes, side)]))
            if n < FEWEST:
                raise DataError(
                    f"{c.name}: '{label}' has cells of {n} donors in obs['{key}']; their variance "
                    f"needs at least {FEWEST}. Without donor_key= cells are compared, which says nothing "
                    "of other donors"
                )
    return Donors(key, codes, names)


def warn_of_replicates(adata: Any, groups: Groups, batch_key: str | None) -> None:
    """Warn where cells of few donors would be taken for replicates.

    Nothing is said of a search for markers as long as donors are in both groups.

    Parameters
    ----------
    adata
        AnnData whose ``obs`` is searched for columns that look like donors.
    groups
        What is compared.
    batch_key
        Column of the model's batches; None for none. They may be donors: nothing is said unless they are in
        one group only.
    """
    named = [k for k in adata.obs.columns if "".join(filter(str.isalpha, str(k).lower())) in _DONORS]
    found = [*named, *([] if batch_key is None or batch_key in named else [batch_key])]
    for key in found:
        if key in (groups.key, groups.within) or key not in adata.obs:
            continue
        names, codes = _codes(adata, key, groups.codes >= 0)
        if len(names) < 2 or len(names) > (groups.codes >= 0).sum() / 2:
            continue
        sides = [
            tuple({*np.unique(codes[np.isin(groups.codes, side)])} - {-1} for side in (c.first, c.second))
            for c in groups.comparisons
        ]
        split = [c.name for c, (one, two) in zip(groups.comparisons, sides, strict=True) if not one & two]
        if split:
            warn(
                f"{listed(split, 2)}: no category of obs['{key}'] has cells in both groups, so that a "
                f"difference between the groups cannot be told from one between those of '{key}'. Cells are "
                f"not replicates: take donor_key='{key}' if these are donors, whose number is then the "
                "sample size"
            )
            return
        if not groups.markers and key in named:
            warn(
                f"cells of obs['{key}'] ({len(names)} categories) are taken for independent, although those "
                "of one donor are alike: probabilities are too sure of differences between conditions. Take "
                f"donor_key='{key}', or see this as a description of these donors alone"
            )
            return
