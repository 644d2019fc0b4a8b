"""Reads and fragments: counts of ATAC are either, and mean different things.

A fragment has two ends, and so two insertions. Files count fragments, or the insertions in a peak (reads),
of which most fragments give two: then even values outnumber odd ones. Of fragments odd values do, since
under any mixture of Poisson laws P(odd) - P(even > 0) = E[exp(-m) (1 - exp(-m))] > 0 (Martens et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from pyrosc.data.errors import one_of, warn

if TYPE_CHECKING:
    from pyrosc.data.schema import Field

#: Keyword by which the user says what the counts are.
UNITS = "counts"
_CHOICES = ("auto", "reads", "fragments")
_ROWS = 4096  # looked at


def keywords_of(fields: Mapping[str, Field]) -> set[str]:
    """Keywords that say where fields are, and in which unit."""
    found = {f.keyword for f in fields.values() if f.keyword}
    return found | ({UNITS} if any(f.unit for f in fields.values()) else set())


def even_share(source: Any) -> float:
    """Share of even values among the positive ones, in some thousand rows spread over a matrix; NaN for none.

    Parameters
    ----------
    source
        Any matrix that AnnData holds, in memory or on disk.
    """
    n = int(source.shape[0])
    step = max(n // _ROWS, 1)
    if step > 1 and not isinstance(source, np.ndarray):  # files are read in blocks, not row by row
        starts = np.linspace(0, n - _ROWS // 16, 16).astype(int)
        blocks = [source[int(i) : int(i) + _ROWS // 16] for i in starts]
    else:
        blocks = [source[::step] if step > 1 else source[:n]]
    even = total = 0
    for block in blocks:
        values = block.data if sp.issparse(block) else np.asarray(block).ravel()
        values = values[values > 0]
        even, total = even + int(np.count_nonzero(values % 2 == 0)), total + values.size
    return even / total if total else float("nan")


def are_reads(source: Any, keys: Mapping[str, Any], where: str) -> bool:
    """Whether a matrix holds reads: as the user says by ``counts=``, else by its even values.

    Parameters
    ----------
    source
        The matrix.
    keys
        What the user gave, by keyword.
    where
        The matrix in words.

    Warns
    -----
    DataWarning
        If they are recognised as reads, which become fragments.
    """
    said = keys.get(UNITS, "auto")
    one_of(UNITS, said, _CHOICES)
    if said != "auto":
        return said == "reads"
    share = even_share(source)
    if not share > 0.5:
        return False
    warn(
        f"{share:.0%} of the values in {where} are even, as of reads (insertions), two of which make "
        "a fragment; ceil(x/2) fragments are taken. Say counts='reads' if that is right, counts='fragments' "
        "if not"
    )
    return True
