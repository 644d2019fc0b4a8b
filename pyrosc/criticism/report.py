"""Everything about a trained model on one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pyrosc.criticism.page import Section, check_target, page, write
from pyrosc.criticism.sections import PARTS
from pyrosc.criticism.subject import LeftOut, Subject
from pyrosc.data import encode as enc
from pyrosc.data.errors import one_of
from pyrosc.data.schema import MAIN

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model


def report(
    model: Model,
    adata: AnnData | None = None,
    path: str | Path = "report.html",
    *,
    labels_key: str | None = None,
    batch_key: str | None = None,
    title: str | None = None,
    max_cells: int = 2000,
    leave_out: Sequence[str] = (),
    overwrite: bool = False,
    seed: int = 0,
) -> Path:
    """Write what can be said of a trained model to a self-contained HTML page.

    It holds what the model is, its training curve, the ELBO of held-out cells, the latent space, predictive
    checks, calibration of predictive intervals, DE genes kept, k-hat of the guide, simulation-based
    calibration, integration scores (with scib-metrics), and labels where the model has them, each with a
    verdict in plain words and what to try. A part that the model or the data lack something for is named with
    the reason. The page has no script and makes no request; pictures are inside it.

    Parameters
    ----------
    model
        A trained model of one data source.
    adata
        Cells to judge it by; default those the model was made with, of which fit is judged by the held-out
        ones.
    path
        Where to write. Folders are made; the file is replaced in one step.
    labels_key
        Column of obs with known groups, to colour and compare by; default the labels registered.
    batch_key
        Column of obs with batches; default that registered.
    title
        Default: the name of the class.
    max_cells
        Of more cells than this, each part looks at as many, drawn at random.
    leave_out
        Titles of parts not to make, such as ``"Integration"``, which takes the longest where scib-metrics is
        installed.
    overwrite
        Replace a file at `path` that is not a report of pyrosc. An earlier report is always replaced.
    seed
        Of everything random; no global generator is touched.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    FileExistsError
        If there is a file at `path` that is not a report, before any work.
    DataError
        If there is no such column.
    ValueError
        If the model reads several data sets, has no data, or there is no such part to leave out.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.simulate.scvi(60, 20, seed=0).adata
    >>> model = pyrosc.SCVI.from_anndata(adata, n_hidden=8).fit()  # doctest: +SKIP
    >>> pyrosc.report(model, path="report.html")  # doctest: +SKIP
    PosixPath('report.html')
    """
    path = Path(path)
    check_target(path, overwrite)
    if list(model.registries) != [MAIN]:
        raise ValueError(f"{type(model).__name__} reads several data sets; a report is of a model of one")
    if max_cells < 20:
        raise ValueError(f"max_cells is at least 20; not {max_cells}")
    if isinstance(leave_out, str):
        raise TypeError(f"leave_out is a list of titles; write ['{leave_out}']")
    for name in leave_out:
        one_of("leave_out", name, [title for title, _ in PARTS])
    started = time.perf_counter()
    subject = Subject(
        model,
        None if adata is None or model.dataset(adata) is model.datasets.get(MAIN) else adata,
        batch_key or _registered(model, "batch"),
        labels_key or _registered(model, "labels"),
        max_cells,
        seed,
    )
    for key in (batch_key, labels_key):
        if key is not None:
            enc.column(subject.dataset.data, key)  # a missing one is an error that lists those there are
    sections: list[Section] = []
    left_out: list[tuple[str, str]] = []
    for name, make in PARTS:
        if name in leave_out:
            left_out.append((name, "as asked"))
            continue
        try:
            sections.append(make(subject))
        except (LeftOut, ValueError, KeyError) as reason:
            left_out.append((name, str(reason.args[0] if reason.args else reason)))
    seconds = time.perf_counter() - started
    made = f"Made {datetime.now():%Y-%m-%d %H:%M} in {seconds:.0f} s; seed {seed}."
    write(path, page(title or f"{type(model).__name__}: model report", made, sections, left_out))
    return path


def _registered(model: Model, field: str) -> str | None:
    """Column of a registered field."""
    keys = model.registry.keys(field) if field in model.registry.fields else ()
    return keys[0] if len(keys) == 1 else None


__all__ = ["report"]
