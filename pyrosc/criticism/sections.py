"""The parts of a report: each looks at a trained model and says what it sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.criticism import words
from pyrosc.criticism.de_genes import de_genes_kept
from pyrosc.criticism.guide import guide_diagnostics
from pyrosc.criticism.integration import has_scib, integration_metrics
from pyrosc.criticism.page import Section
from pyrosc.criticism.predictive import LEVELS, PredictiveChecks, predictive_checks
from pyrosc.criticism.sbc import simulation_based_calibration
from pyrosc.data import encode as enc
from pyrosc.data.schema import MAIN
from pyrosc.infer.calibration import expected_calibration_error
from pyrosc.io import versions
from pyrosc.tools.layout import umap
from pyrosc.tools.predict import predict
from pyrosc.train.history import kept_epoch, last_run, late_gain

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from pyrosc.data import Dataset
    from pyrosc.models.base import Model

_MOST_ENTRIES = 44  # of a legend


class LeftOut(Exception):
    """The model or the data lack what a part is about; the message says what."""


@dataclass
class Subject:
    """What a report is about.

    Attributes
    ----------
    model, adata
        The model, and other cells than the registered ones, if any.
    batch_key, labels_key
        Columns of obs, or None.
    max_cells
        Most cells that a part looks at.
    seed
        Of everything random.
    """

    model: Model
    adata: AnnData | None
    batch_key: str | None
    labels_key: str | None
    max_cells: int
    seed: int

    @cached_property
    def dataset(self) -> Dataset:
        return self.model.dataset(self.adata)

    @cached_property
    def held_out(self) -> np.ndarray | None:
        """Rows that were held out; None where there are none, or for other cells."""
        rows = self.model.split.get(MAIN, (None, np.arange(0)))[1]
        return rows if self.adata is None and len(rows) else None

    @cached_property
    def shown(self) -> np.ndarray:
        """Rows of the cells in pictures."""
        return self._some(np.arange(self.dataset.n_obs))

    @cached_property
    def checked(self) -> np.ndarray:
        """Rows of the cells that fit is judged by: those held out, where there are some."""
        rows = np.arange(self.dataset.n_obs) if self.held_out is None else self.held_out
        return self._some(rows)

    @cached_property
    def which(self) -> str:
        """In words, the cells of `checked`."""
        n = len(self.checked)
        if self.adata is not None:
            return f"{n:,} cells that were passed to the report"
        return f"{n:,} held-out cells" if self.held_out is not None else f"{n:,} cells that trained the model"

    @cached_property
    def checks(self) -> PredictiveChecks:
        return predictive_checks(
            self.model, self.adata, self.checked, max_cells=self.max_cells, seed=self.seed
        )

    @cached_property
    def latent(self) -> np.ndarray:
        """Latent space of the cells shown."""
        found = self.model.get_latent_representation(self.adata, self.shown, seed=self.seed)
        return np.asarray(found)

    def column(self, key: str) -> pd.Series:
        return enc.column(self.dataset.data, key)

    def _some(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) <= self.max_cells:
            return rows
        return np.sort(np.random.default_rng(self.seed).choice(rows, self.max_cells, replace=False))


def the_model(on: Subject) -> Section:
    """Class, options, fields, sizes and versions."""
    model, section = on.model, Section("Model")
    section.say(_first_line(type(model)))
    n = sum(p.numel() for p in model.parameters())
    rows: list[tuple[str, Any]] = [("class", type(model).__name__)]
    rows.append(("options", words.options(model)))
    for source, registry in model.registries.items():
        prefix = "" if len(model.registries) == 1 else f"[{source}] "
        train, held_out = (len(part) for part in model.split.get(source, ((), ())))
        split = f" ({train:,} trained, {held_out:,} held out)" if train else ""
        rows.append((f"{prefix}cells", f"{registry.n_obs:,}{split}"))
        rows += [(prefix + name, text) for name, text in words.fields(registry)]
    if on.adata is not None:
        rows.append(("cells of this report", f"{on.dataset.n_obs:,}, passed as adata"))
    rows += [("parameters", f"{n:,} on {model.device}")]
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in versions().items())))
    section.facts(rows)
    return section


def training(on: Subject) -> Section:
    """The training curve, and whether it was long enough."""
    from pyrosc.pl.training import training_curve

    history = on.model.history
    if history is None or not len(history):
        raise LeftOut("the model is not trained")
    section, run = Section("Training"), last_run(history)
    best = kept_epoch(history)
    held_out = "elbo_validation" in history
    words.training(section, run, late_gain(run), best, len(history))
    section.figures(
        (
            lambda ax: training_curve(history, ax),
            (6.0, 4.0),
            "ELBO of training" + (" and held-out" if held_out else "") + " cells at each epoch",
        )
    )
    section.facts(
        [
            (
                "epochs",
                f"{len(history):,}{'' if best is None else f', weights of epoch {best + 1:,} kept'}",
            ),
            ("seconds", f"{float(history['seconds'].iloc[-1]):,.1f}"),
            ("steps of the last run", f"{int(run['steps'].iloc[-1]):,}"),
        ]
    )
    return section


def fit(on: Subject) -> Section:
    """ELBO of held-out and training cells and its parts, and latent dimensions in use."""
    model, section = on.model, Section("Fit")
    sets = {on.which: on.checked}
    if on.held_out is not None:
        train = model.train_indices
        sets[f"{min(len(train), len(on.checked)):,} training cells"] = np.sort(
            np.random.default_rng(on.seed).choice(train, min(len(train), len(on.checked)), replace=False)
        )
    table = {}
    for name, rows in sets.items():
        options: dict[str, Any] = {"indices": rows, "n_samples": 10, "seed": on.seed}
        elbo = np.asarray(model.get_elbo(on.adata, per_cell=True, **options), np.float64)
        error = model.get_reconstruction_error(on.adata, **options)
        table[name] = {
            "ELBO": elbo.mean(),
            "± standard error": elbo.std(ddof=1) / np.sqrt(len(elbo)) if len(elbo) > 1 else np.nan,
            "reconstruction": -error,
            "KL and the rest": -error - elbo.mean(),
        }
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("cells")
    section.table(frame, "Nats per cell, higher is better; ELBO = reconstruction − KL", digits=4)
    words.overfit(section, frame)
    if model.latent in model.latent_sites(local=True):
        _dimensions(on, section)
    return section


def _dimensions(on: Subject, section: Section) -> None:
    z = on.latent
    if z.ndim != 2:
        return
    spread = z.var(0)
    used = int((spread > words.ACTIVE).sum())
    words.dimensions(section, used, z.shape[1], on.model.latent)


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


def predictive(on: Subject) -> Section:
    """Moments and zeros of genes and cells, observed and replicated."""
    from pyrosc.pl import criticism as pl

    checks, section = on.checks, Section("Predictive checks")
    section.say(
        f"Counts drawn from the model for {on.which}, {checks.n_samples} times, beside the observed ones. "
        "Where the model fits, they cannot be told apart."
    )
    words.predictive(section, checks)
    size = (4.6, 4.0)
    section.figures(
        (lambda ax: pl.mean_variance(checks, ax), size, "Variance against mean of each gene"),
        (lambda ax: pl.statistic(checks, "cv", "genes", ax), size, "Coefficient of variation of each gene"),
        (lambda ax: pl.statistic(checks, "zeros", "genes", ax), size, "Share of zeros of each gene"),
        (lambda ax: pl.statistic(checks, "library", "cells", ax), size, "Library size of each cell"),
    )
    table = checks.summary.rename(index=words.STATISTICS, level="statistic").reset_index()
    table["n"] = table["n"].astype(int)
    section.table(
        table,
        "error, bias: of natural logarithms (0.1 is 10 %), of shares for zeros; inside: share of observed "
        "values within 90 % of the replicates",
        index=False,
    )
    section.table(_worst(checks), "Genes that fit worst, by their coefficient of variation", folded=True)
    return section


def _worst(checks: PredictiveChecks, n: int = 12) -> pd.DataFrame:
    cv = checks.statistic("cv")
    with np.errstate(divide="ignore", invalid="ignore"):
        off = pd.Series(np.log(cv["replicated"] / cv["observed"]))
    # a gene in few cells has a coefficient of variation that says little
    often = checks.statistic("zeros")["observed"] <= 1 - max(5 / checks.n_cells, 0.02)
    order = off[often & np.isfinite(off)].abs().sort_values(ascending=False).index[:n]
    found = cv.loc[order, ["observed", "replicated", "low", "high"]]
    found["mean"] = checks.statistic("mean").loc[order, "observed"]
    return found


def intervals(on: Subject) -> Section:
    """Calibration of predictive intervals."""
    from pyrosc.pl import criticism as pl

    checks, section = on.checks, Section("Predictive intervals")
    section.say(
        "An interval of level 90 % should hold 90 % of the counts. A count's place among the replicated ones "
        "(ties at random) is uniform for a right model."
        + (
            " Each interval is made without the count that it is judged by."
            if checks.leave_one_out
            else " The law of a cell's counts is not a product over genes, so that each count has helped to "
            "make its own interval: misfit shows less than there is."
        )
    )
    words.intervals(section, checks)
    section.figures(
        (lambda ax: pl.intervals(checks, ax), (4.6, 4.4), "Counts inside intervals, against their level"),
        (lambda ax: pl.pit(checks, ax), (4.6, 4.4), "Places of observed counts: flat is right"),
    )
    wide = checks.calibration.pivot(index="genes", columns="level", values="coverage")
    wide = wide.loc[checks.calibration["genes"].unique()]
    wide.columns = [words.percent(level) for level in sorted(LEVELS)]
    sizes = checks.calibration.groupby("genes", sort=False)["values"].first()
    wide.insert(0, "counts", sizes)
    section.table(wide[sizes > 0], "Share of counts inside intervals of each level")
    return section


def de_genes(on: Subject) -> Section:
    """Whether marker genes of groups are those of the data."""
    key = on.labels_key or on.batch_key
    if key is None:
        raise LeftOut("there are no groups to compare; name a column: labels_key=")
    found = de_genes_kept(on.model, key, on.adata, max_cells=on.max_cells, seed=on.seed)
    section = Section("DE genes kept")
    section.say(
        f"The 50 genes most raised in each group of '{key}', by Welch's t statistic on log-normalised "
        "counts: how many of them are on top in replicated data too. Two resamples of the cells (bootstrap) "
        "do not agree fully either; what they share is about what a right model would reach."
    )
    words.de_genes(section, found)
    section.table(found, f"By group of '{key}'")
    return section


def guide(on: Subject) -> Section:
    """k-hat of the guide."""
    from pyrosc.pl import criticism as pl

    found = guide_diagnostics(on.model, on.adata, on.checked, max_cells=min(500, on.max_cells), seed=on.seed)
    section = Section("Posterior of the cells")
    section.say(
        "The guide gives each cell an approximate posterior. Draws from it are weighted by how much "
        "likelier they are under the model; k-hat is how heavy the tail of those weights is. Below 0.5 the "
        "guide covers the posterior, up to 0.7 weighting can mend it, above that it is too narrow or in the "
        "wrong place."
    )
    words.guide(section, found)
    section.figures((lambda ax: pl.khat(found, ax), (5.0, 3.6), f"k-hat of {len(found.cells):,} cells"))
    s = found.summary
    section.facts(
        [
            ("sites", ", ".join(found.sites)),
            (f"cells with k-hat below {found.threshold:.2f}", words.percent(s["reliable"])),
            ("median k-hat", f"{s['khat']:.2f}"),
            (f"median effective draws of {found.n_samples}", f"{s['ess']:.1f}"),
            ("ELBO, nats per cell", f"{s['elbo']:,.1f}"),
            ("log evidence, nats per cell", f"{s['log_evidence']:,.1f}"),
            ("gap, nats per cell", f"{s['gap']:.1f}"),
        ]
    )
    return section


def simulations(on: Subject) -> Section:
    """Simulation-based calibration with the decoder as it is."""
    from pyrosc.pl import criticism as pl

    found = simulation_based_calibration(on.model, on.adata, n_simulations=500, n_draws=99, seed=on.seed)
    section = Section("Simulated cells")
    section.say(
        "Cells are drawn from the model as it is, with known latent values; the guide then reads their "
        "counts. True values should rank evenly among its draws: bars inside the band. A ∪ shape is a "
        "posterior that is too narrow, a ∩ shape too wide, a slope shifted."
    )
    words.simulations(section, found)
    shown = list(map(str, found.table["deviation"].sort_values(ascending=False).index[:8]))

    def one(quantity: str) -> Callable[[Axes], Any]:
        return lambda ax: pl.ranks(found, [quantity], axes=[ax])

    if len(shown) < len(found.ranks):
        section.say(f"Of {len(found.ranks)} quantities, the {len(shown)} that deviate most:")
    size = (2.5, 2.2)
    section.figures(*((one(q), size, f"ranks of {q}") for q in sorted(shown)), small=True)
    section.table(found.table, "By quantity", folded=True)
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


def _first_line(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).strip().splitlines()[0]


#: In the order of the page: the title under which a part that is left out is named, and what makes it.
PARTS: tuple[tuple[str, Callable[[Subject], Section]], ...] = (
    ("Model", the_model),
    ("Training", training),
    ("Fit", fit),
    ("Latent space", latent_space),
    ("Labels", labels),
    ("Predictive checks", predictive),
    ("Predictive intervals", intervals),
    ("DE genes kept", de_genes),
    ("Posterior of the cells", guide),
    ("Simulated cells", simulations),
    ("Integration", integration),
)
