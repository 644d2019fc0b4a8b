"""Genes that several data sets share, matched by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyrosc.data.errors import DataError, listed


def shared_genes(
    names: Mapping[str, Sequence[str]], *, ignore_case: bool = False, at_least: int = 1
) -> dict[str, list[str]]:
    """Genes that all data sets have, each by its own spelling.

    Parameters
    ----------
    names
        Gene names (``var_names``) by data set.
    ignore_case
        Take names that differ only in upper and lower case for the same gene (``Actb`` and ``ACTB``).
    at_least
        Fewest shared genes that will do.

    Returns
    -------
    dict
        A list per data set, all of one length and in the order of the first data set.

    Raises
    ------
    DataError
        If fewer genes are shared; if ignoring case makes two genes of one data set the same.

    Examples
    --------
    >>> shared_genes({"seq": ["ACTB", "CD3E", "LYZ"], "spatial": ["Lyz", "Actb"]}, ignore_case=True)
    {'seq': ['ACTB', 'LYZ'], 'spatial': ['Actb', 'Lyz']}
    """
    folded = {source: _folded(source, list(map(str, own)), ignore_case) for source, own in names.items()}
    first, *others = folded.values()
    kept = [key for key in first if all(key in other for other in others)]
    if len(kept) < at_least:
        first_name, *rest = names
        found = set(kept)
        missing = [name for key, name in first.items() if key not in found]
        raise DataError(
            f"{listed(rest)} and {first_name!r} share {len(kept):,} of the {len(first):,} genes of "
            f"{first_name!r}, and at least {at_least:,} are needed; not shared are {listed(missing)}. "
            f"Genes are matched by var_names: {_hint(names, len(kept), ignore_case)}"
        )
    return {source: [own[key] for key in kept] for source, own in folded.items()}


def _folded(source: str, names: list[str], ignore_case: bool) -> dict[str, str]:
    """Names by what they are matched by."""
    if not ignore_case:
        return {name: name for name in names}
    found: dict[str, str] = {}
    for name in names:
        before = found.setdefault(name.casefold(), name)
        if before != name:
            raise DataError(
                f"{source!r} has genes {before!r} and {name!r}, which are one if case is ignored; "
                "leave one of them out, or match case"
            )
    return found


def _hint(names: Mapping[str, Sequence[str]], n_shared: int, ignore_case: bool) -> str:
    if not ignore_case:
        sets = [{str(n).casefold() for n in own} for own in names.values()]
        if len(set.intersection(*sets)) > n_shared:
            return "more match when case is ignored (ignore_case=True)"
    return "are all symbols, or all Ensembl ids?"
