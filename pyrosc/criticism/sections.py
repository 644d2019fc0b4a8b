"""The parts of a report: each looks at a trained model and says what it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.criticism import words
from pyrosc.criticism.de_genes import de_genes_kept
from pyrosc.criticism.guide import guide_diagnostics
from pyrosc.criticism.outputs import integration, labels, latent_space
from pyrosc.criticism.page import Section
from pyrosc.criticism.predictive import LEVELS, PredictiveChecks
from pyrosc.criticism.sbc import simulation_based_calibration
from pyrosc.criticism.subject import LeftOut, Subject
from pyrosc.io import versions
from pyrosc.train.history import kept_epoch, last_run, late_gain

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
