"""What numbers mean, in plain words, and what to try."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from pyrosc.criticism.guide import GuideDiagnostics
    from pyrosc.criticism.page import Level, Section
    from pyrosc.criticism.predictive import PredictiveChecks
    from pyrosc.criticism.sbc import Calibration
    from pyrosc.data import Registry
    from pyrosc.models.base import Model

#: Variance over cells of a latent dimension's posterior means above which it is in use
#: (Burda, Grosse and Salakhutdinov 2016, section 5.2).
ACTIVE = 0.01
STATISTICS = {"cv": "coefficient of variation", "zeros": "share of zeros", "library": "library size"}

_LARGER = "Try a larger model (n_hidden=, n_latent=), longer training, or another likelihood."


def options(model: Model) -> str:
    """Options that differ from their defaults."""
    from pyrosc.models.build import options_of

    known = {n: p.default for n, p in options_of(type(model)).items()}
    changed = {k: v for k, v in model.config.items() if known.get(k, inspect.Parameter.empty) != v}
    shown = {k: (f"{str(v)[:117]}…" if len(str(v)) > 120 else repr(v)) for k, v in changed.items()}
    return ", ".join(f"{k}={v}" for k, v in shown.items()) or "defaults"


def fields(registry: Registry) -> list[tuple[str, str]]:
    """Registered fields: name, and where it is and what it holds."""
    rows = []
    for name, state in registry.fields.items():
        if not state.given:
            continue
        parts = [state.where if state.keys or state.kind == "counts" else state.kind]
        if state.names:
            parts.append(f"{len(state.names):,} features")
        for categories in state.categories:
            few = ", ".join(categories[:6]) + (", …" if len(categories) > 6 else "")
            parts.append(f"{len(categories):,} categories ({few})")
        rows.append((name, "; ".join(parts)))
    return rows


def training(
    section: Section, run: pd.DataFrame, late: tuple[float, int] | None, best: int | None, n_epochs: int
) -> None:
    """Whether training was long enough."""
    if "elbo_validation" not in run:
        section.judge("note", "No cell was held out in training, so that overfitting cannot be seen.")
    elif best is None:
        section.judge(
            "bad",
            "Training ended before the KL had its full weight: the latent space is not that of the bound.",
            "Train to the end of the plan: call fit() again, or with more epochs.",
        )
    elif late is not None:
        section.judge(
            "bad",
            f"The held-out ELBO was still rising at the end, by {late[0]:.1f} nats per cell over the last "
            f"{late[1]:,} epochs.",
            f"Train longer: fit(max_epochs={2 * n_epochs}).",
        )
    else:
        section.judge("good", "The held-out ELBO had stopped rising when training ended.")


def overfit(section: Section, table: pd.DataFrame) -> None:
    """The gap between held-out cells, in the first row, and training cells, in the second."""
    if len(table) < 2:
        return
    elbo, error = table["ELBO"].to_numpy(float), table["± standard error"].to_numpy(float)
    gap, unsure = elbo[1] - elbo[0], float(np.hypot(*error))
    share = gap / max(abs(elbo[0]), 1e-9)
    if gap > 2 * unsure and share > 0.05:
        section.judge(
            "note" if share < 0.2 else "bad",
            f"Training cells fit better than held-out ones, by {gap:,.1f} ± {unsure:.1f} nats per cell "
            f"({percent(share)}): part of what the model knows is of its own cells only.",
            "The weights kept are those that were best for held-out cells. More cells, fewer genes or a "
            "smaller n_hidden narrow the gap.",
        )
    else:
        section.judge(
            "good", f"Held-out cells fit as well as training cells ({_signed(-gap, 1)} ± {unsure:.1f} nats)."
        )


def dimensions(section: Section, used: int, n: int, site: str) -> None:
    """Latent dimensions in use."""
    if used == n:
        section.judge("good", f"All {n} dimensions of '{site}' are in use.")
        return
    text = f"{used} of the {n} dimensions of '{site}' are in use; the others are the same for all cells."
    if used == 0:
        section.judge("bad", text, "The latent space carries nothing: train longer.")
    else:
        section.judge("note", text, "They do no harm; n_latent could be smaller.")


def predictive(section: Section, checks: PredictiveChecks) -> None:
    """Moments and zeros, beside what a right model would come to."""
    zeros = checks.scores("zeros")
    if np.isfinite(zeros["error"]):
        level = _level(zeros["error"] - zeros["expected"], 0.01, 0.04)
        text = (
            f"The share of zeros of a gene is matched within ±{100 * zeros['error']:.1f} percentage points "
            f"(±{100 * zeros['expected']:.1f} by chance alone)"
        )
        more = "more" if zeros["bias"] > 0 else "fewer"
        advice = f"Replicates have {more} zeros; compare the likelihoods nb and zinb."
        section.judge(level, text + ".", "" if level == "good" else advice)
    cv = checks.scores("cv")
    if np.isfinite(cv["error"]):
        level = _level(cv["error"] - cv["expected"], 0.1, 0.3)
        text = (
            f"The coefficient of variation of a gene is matched within ±{percent(np.expm1(cv['error']))} "
            f"(±{percent(np.expm1(cv['expected']))} by chance alone)"
        )
        way = "too variable" if cv["bias"] > 0 else "too even"
        text += "." if level == "good" else f"; replicated genes are {way}."
        section.judge(level, text, "" if level == "good" else _LARGER)
    library = checks.scores("library", "cells")
    if np.isfinite(library["bias"]):
        bias = float(np.expm1(library["bias"]))
        level = _level(abs(bias), 0.05, 0.15)
        text = f"Replicated library sizes are {percent(abs(bias), 1)} too {'large' if bias > 0 else 'small'}"
        advice = "A zero-inflated law drops counts on top of its mean; try gene_likelihood='nb'."
        if level == "good":
            section.judge(level, "Library sizes are matched" + f" ({_signed(100 * bias, 1)} %).")
        else:
            section.judge(level, text + " on average.", advice if bias < 0 else "")


def intervals(section: Section, checks: PredictiveChecks) -> None:
    """Coverage of 90 % intervals, by group of genes."""
    table = checks.calibration[checks.calibration["level"] == 0.9]
    for name, inside, n in zip(table["genes"], table["coverage"], table["values"], strict=True):
        if not n or name == "all":
            continue
        level = _level(abs(inside - 0.9), 0.02, 0.05)
        text = f"Genes with {name} count per cell: {percent(inside, 1)} of the counts are in 90 % intervals."
        wide = (
            "Intervals are too wide: the model takes for noise what is structure. Try a larger latent space, "
            "longer training, or a dispersion per group (dispersion=)."
        )
        narrow = f"Intervals are too narrow: counts vary more than the model says. {_LARGER}"
        section.judge(level, text, "" if level == "good" else wide if inside > 0.9 else narrow)


def de_genes(section: Section, found: pd.DataFrame) -> None:
    """Overlap of DE genes."""
    kept, reach = float(found["kept"].mean()), float(found["between_resamples"].mean())
    level = _level(1 - kept / reach if reach > 0 else 1.0, 0.15, 0.4)
    worst = str((found["kept"] / found["between_resamples"]).idxmin())
    advice = (
        f"The model blurs what sets groups apart ('{worst}' most). Try longer training, a larger latent "
        "space, or more of the genes that mark the group."
    )
    section.judge(
        level,
        f"{percent(kept)} of the top genes of a group are kept; two resamples of the data share "
        f"{percent(reach)}.",
        "" if level == "good" else advice,
    )


def guide(section: Section, found: GuideDiagnostics) -> None:
    """k-hat and the gap."""
    s = found.summary
    high = float(s["khat_above_0.7"])
    text = (
        f"{percent(high)} of the cells have a k-hat above 0.7; the guide is {s['gap']:.1f} nats per cell "
        "away from the posterior."
    )
    advice = (
        "Standard deviations and intervals of a cell's latent values are too small there; their means are "
        "less affected. That is usual for a network that reads cells (amortised inference). More cells in "
        "training, a larger n_hidden or fewer latent dimensions narrow the gap; to compare models use "
        "compare(measure='marginal_ll')."
    )
    section.judge(_level(high, 0.1, 0.5), text, "" if high <= 0.1 else advice)


def simulations(section: Section, found: Calibration) -> None:
    """Coverage in simulated cells."""
    if found.passes():
        section.judge("good", f"Ranks are uniform (least adjusted p-value {found.p_value:.2g}).")
        return
    coverage = float(found.coverage[0.9])
    width = float(found.table["z_sd"].mean())
    text = f"90 % intervals of latent values hold the truth in {percent(coverage)} of simulated cells"
    text += f"; errors are {width:.1f} times what the guide says." if np.isfinite(width) else "."
    advice = (
        "Do not read the guide's standard deviations as they are. Simulated cells may be unlike those that "
        "trained the guide, which adds to it; k-hat is of real cells."
    )
    level = _level(abs(coverage - 0.9), 0.02, 0.1)
    section.judge(level, text, "" if level == "good" else advice)


def labels(section: Section, accuracy: float, error: float, n: int) -> None:
    """Accuracy and calibration of predicted labels."""
    text = f"{percent(accuracy, 1)} of {n:,} cells with a known label get it."
    section.judge(_level(1 - accuracy, 0.1, 0.3), text)
    section.judge(
        _level(error, 0.05, 0.1),
        f"Probabilities of labels are off by {percent(error, 1)} on average (expected calibration error).",
    )


def percent(share: float, digits: int = 0) -> str:
    """A share in per cent, with a space that does not break.

    Examples
    --------
    >>> percent(0.125, 1).replace("\N{NO-BREAK SPACE}", " ")
    '12.5 %'
    """
    return f"{100 * share:,.{digits}f}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")


def _level(value: float, good: float, note: float) -> Level:
    return "good" if value <= good else "note" if value <= note else "bad"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
