"""The parts of a report about what a model gives its user: the latent space and labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.criticism import words
from pyrosc.criticism.integration import has_scib, integration_metrics
from pyrosc.criticism.page import Section
from pyrosc.criticism.subject import LeftOut, Subject
from pyrosc.data import encode as enc
from pyrosc.infer.calibration import expected_calibration_error
from pyrosc.tools.layout import umap
from pyrosc.tools.predict import predict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ENTRIES = 44  # of a legend


def latent_space(on: Subject) -> Section:
    """The latent space in two dimensions."""
    from pyrosc.pl import _style as style
    from pyrosc.pl.embedding import categories
    from pyrosc.pl.embedding import latent as draw

    z = on.latent
    if z.ndim != 2 or z.shape[1] < 2 or len(z) < 5:
        raise LeftOut("a picture needs a latent space of two dimensions or more, and five cells")
    xy = z if z.shape[1] == 2 else umap(z, seed=on.seed)
    axis = "dimension" if z.shape[1] == 2 else "UMAP"
    panels: dict[str, tuple[Any, dict[str, Any]]] = {}
    for key in (on.labels_key, on.batch_key):
        if key is not None and key not in panels:
            values = on.column(key).iloc[on.shown]
            if not pd.api.types.is_numeric_dtype(values) or values.nunique() <= _MOST_ENTRIES:
                values = pd.Series(pd.Categorical(enc.category_names(values), enc.category_order(values)))
            panels[key] = values, {}
    if on.dataset.matrices:
        totals = on.dataset.summary().cell_sums[on.shown]
        panels["library size"] = totals, {"scale": "log1p", "label": "counts per cell"}
    section = Section("Latent space")
    what = f"site '{on.model.latent}'" if z.shape[1] == 2 else f"UMAP of the site '{on.model.latent}'"
    section.say(
        f"{what} of {len(on.shown):,} cells. A UMAP shows neighbourhoods; distances between groups and their "
        "sizes mean little."
    )
    drawn: list[tuple[Callable[[Axes], Any], tuple[float, float], str]] = []
    for name, (values, more) in panels.items():
        entries = categories(values) if isinstance(values, pd.Series) else ()
        many = len(entries) > _MOST_ENTRIES
        beside = 0.0 if many else style.legend_width(entries)

        def one(ax: Axes, v: Any = values, m: Any = more, t: str = name, hide: bool = many) -> None:
            draw(xy, v, ax=ax, title=t, legend=not hide, seed=on.seed, **m)
            ax.set_xlabel(f"{axis} 1", fontsize=style.SMALL, loc="left")
            ax.set_ylabel(f"{axis} 2", fontsize=style.SMALL, loc="bottom")

        drawn.append((one, (4.4 + (beside or 0.4), 4.2), f"by {name}"))
    if not drawn:
        drawn.append((lambda ax: draw(xy, ax=ax), (4.4, 4.2), "cells"))
    section.figures(*drawn)
    return section


def integration(on: Subject) -> Section:
    """Scores of scib-metrics."""
    if on.batch_key is None or on.labels_key is None:
        raise LeftOut("it needs a column of batches and one of labels: batch_key=, labels_key=")
    if not has_scib():
        raise LeftOut("scib-metrics is not installed: pip install pyrosc[bench]")
    data = on.dataset.data[on.shown]
    counts = next(s for s in on.model.registry.fields.values() if s.kind == "counts")
    layer = counts.keys[0] if counts.keys else None
    found = integration_metrics(
        data, on.batch_key, on.labels_key, {on.model.latent: on.latent}, layer=layer, seed=on.seed
    )
    section = Section("Integration")
    section.say(
        f"Scores of scib-metrics in [0, 1], higher is better: how well the batches of '{on.batch_key}' are "
        f"mixed and the groups of '{on.labels_key}' kept apart. They compare models; none is good as such."
    )
    section.table(found.drop(columns="embedding"), f"Latent space of {len(on.shown):,} cells", index=False)
    return section


def labels(on: Subject) -> Section:
    """Predicted labels beside known ones, and how sure they are."""
    from pyrosc.pl import _style as style
    from pyrosc.pl.probabilities import probabilities

    model = on.model
    if model.label is None:
        raise LeftOut("the model predicts no labels")
    soft = predict(model, on.adata, on.checked, soft=True)
    assert isinstance(soft, pd.DataFrame)
    section = Section("Labels")
    confidence = soft.to_numpy().max(1)
    drawn: list[Any] = [
        (lambda ax: _confidence(ax, confidence), (4.8, 3.6), "Probability of the predicted label, over cells")
    ]
    key = on.labels_key
    known = None if key is None else on.column(key).iloc[on.checked]
    if known is not None and set(enc.category_order(known)) & set(map(str, soft.columns)):
        names = enc.category_names(known)
        codes = enc.encode(names, tuple(str(c) for c in soft.columns))
        here = np.array([n is not None for n in names])
        right = soft.to_numpy().argmax(1)[here] == codes[here]
        error = expected_calibration_error(soft.to_numpy()[here], codes[here])
        words.labels(section, float(right.mean()), error, int(here.sum()))
        width = 2.2 + 0.55 * soft.shape[1]
        size = (float(np.clip(width, 4.0, 12)), float(np.clip(1.6 + 0.42 * known.nunique(), 3.0, 12)))
        groups = pd.Series(names, index=soft.index, name=key)
        drawn.append((lambda ax: probabilities(soft, groups, ax), size, f"Mean probability, by '{key}'"))
    counts = pd.Series(soft.columns[soft.to_numpy().argmax(1)]).value_counts(sort=False)
    section.figures(*drawn)
    sure = words.percent((confidence > 0.9).mean())
    section.say(f"{style.count(len(soft), 'cell')}, of which {sure} have a label with probability above 0.9.")
    section.table(counts.rename("cells").rename_axis("predicted").to_frame(), "Cells by label", folded=True)
    return section


def _confidence(ax: Axes, values: np.ndarray) -> None:
    from pyrosc.pl import _style as style

    ax.hist(values, bins=list(np.linspace(0, 1, 21)), color=style.BLUE, alpha=0.75)
    ax.set_xlim(0, 1)
    ax.set_xlabel("probability of the predicted label")
    ax.set_ylabel("cells")
    style.despine(ax)
