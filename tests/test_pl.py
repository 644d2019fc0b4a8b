"""Pictures: what is in the axes, and what must not change around them."""

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from toy import make_adata

import pyrosc
from pyrosc import pl
from pyrosc.pl._style import PALETTE, ticks_log1p
from pyrosc.train.history import kept_epoch


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    return make_adata()


@pytest.fixture(scope="module")
def model(adata):
    """A model of the toy cells, trained a little; `adata` gets an embedding."""
    made = pyrosc.SCVI.from_anndata(adata, layer="counts", batch_key="batch", n_hidden=16, n_latent=2)
    made.fit(6, progress=False, callbacks=[])
    adata.obsm["X_umap"] = made.get_latent_representation()
    return made


@pytest.fixture(autouse=True)
def plt():
    """pyplot, whose settings must be the same after each test, and without figures before and after it."""
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    assert plt.get_fignums() == []
    yield plt
    plt.close("all")
    assert dict(plt.rcParams) == before


@pytest.fixture
def ax():
    """Axes of a figure that pyplot does not know."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained").subplots()


def history(train, held_out=None, weight=None, steps=None) -> pd.DataFrame:
    n = len(train)
    columns = {
        "elbo_train": np.asarray(train, float),
        "kl_weight": np.ones(n) if weight is None else np.asarray(weight, float),
        "steps": np.arange(1, n + 1) if steps is None else np.asarray(steps),
    }
    if held_out is not None:
        columns["elbo_validation"] = np.asarray(held_out, float)
    return pd.DataFrame(columns).rename_axis("epoch")


def labels_of(ax) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [t.get_text() for t in legend.get_texts()]


def points(ax) -> list:
    """Scatter plots with points (legend entries have none)."""
    return [c for c in ax.collections if len(c.get_offsets())]


# -- light imports, no hidden figures --------------------------------------------------------------------


def test_import_is_light():
    heavy = ("matplotlib", "scanpy", "sklearn", "scipy.stats", "numba")
    code = f"import pyrosc.pl, sys; print(*[m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []


def test_figures_are_opened_only_where_no_axes_are_given(model, adata, plt):
    from matplotlib.figure import Figure

    four = Figure().subplots(2, 2)
    pl.training_curve(model, four[0, 0])
    pl.latent(adata, "label", ax=four[0, 1])
    pl.expression(model, ["gene_0", "gene_1"], axes=four[1])
    pl.predictive_check(model, n_samples=1, axes=Figure().subplots(1, 2))
    assert plt.get_fignums() == []
    made = [
        pl.training_curve(model),
        pl.latent(adata, "label"),
        pl.expression(model, ["gene_0"])[0],
        pl.predictive_check(model, n_samples=1)[0],
    ]
    assert len(plt.get_fignums()) == len({a.figure.number for a in made}) == 4


# -- training curve --------------------------------------------------------------------------------------


def test_training_curve_of_a_model(model, ax):
    assert pl.training_curve(model, ax) is ax
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(lines["training cells"].get_xdata(), np.arange(1, 7))
    np.testing.assert_array_equal(lines["held-out cells"].get_ydata(), model.history["elbo_validation"])
    assert ax.get_xlabel() == "epoch"
    assert "nats per cell" in ax.get_ylabel()


def test_training_curve_clips_the_first_epochs_and_says_so(ax):
    curve = -700 - 5000 * np.exp(-np.arange(100) / 3.0)
    pl.training_curve(history(curve, curve - 20), ax)
    low, high = ax.get_ylim()
    assert -1200 < low < -720  # of a curve that starts at −5,720
    assert high > -700
    below = int((curve - 20 < low).sum())
    assert 0 < below <= 10
    assert f"{below} early epochs below the picture" in labels_of(ax)


def test_training_curve_shows_all_where_clipping_gains_little_and_always_the_end(ax):
    values = np.linspace(-800, -700, 50)
    pl.training_curve(history(values), ax)
    assert ax.get_ylim()[0] < -800
    assert not any("below" in text for text in labels_of(ax))
    falling = np.r_[np.linspace(-900, -700, 50), -2000]  # what came out last is never hidden
    pl.training_curve(history(falling), ax)
    assert ax.get_ylim()[0] < -2000


def test_training_curve_shades_the_warm_up_and_marks_the_kept_epoch(ax):
    held_out = [-900, -600, -800, -700, -750]  # the highest is in the warm-up, whose weights are not kept
    table = history([-800] * 5, held_out, weight=[0.3, 0.6, 1, 1, 1])
    pl.training_curve(table, ax)
    shade = ax.patches[0]
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (1, 3)
    assert "KL warm-up" in " ".join(t.get_text() for t in ax.texts)
    assert "best: −700.0 (epoch 4)" in labels_of(ax)
    marked = next(line for line in ax.get_lines() if line.get_label().startswith("best"))
    assert (list(marked.get_xdata()), list(marked.get_ydata())) == ([4], [-700])


def test_kept_epoch_is_of_the_last_run():
    table = history([0] * 4, [-1, -5, -9, -8], steps=[5, 10, 5, 10])
    assert kept_epoch(table) == 3
    assert kept_epoch(history([0] * 2, [-1, -2], steps=[5, 5])) == 1  # two runs of one epoch
    assert kept_epoch(history([0, 0])) is None
    assert kept_epoch(history([0, 0], [-1, -2], weight=[0.1, 0.2])) is None


@pytest.mark.parametrize("held_out", [None, [-3.0]])
def test_training_curve_of_one_epoch_without_held_out_cells(ax, held_out):
    pl.training_curve(history([-2.0], held_out), ax)
    assert ax.get_lines()[0].get_marker() == "o"
    assert np.isfinite([*ax.get_ylim(), *ax.get_xlim()]).all()


def test_training_curve_needs_training(adata):
    with pytest.raises(ValueError, match=r"call model\.fit"):
        pl.training_curve(pyrosc.SCVI.from_anndata(adata, n_hidden=4))


# -- embedding -------------------------------------------------------------------------------------------


def test_latent_of_groups(model, adata, ax):
    assert pl.latent(adata, "label", ax=ax) is ax
    (cells,) = points(ax)
    assert len(cells.get_offsets()) == adata.n_obs
    assert cells.get_rasterized()
    assert labels_of(ax) == ["B", "NK", "T"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("label", "UMAP 1", "UMAP 2")
    assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0
    # every point has the colour of its group, whatever the order of drawing
    away = np.asarray(cells.get_offsets())[:, None] - adata.obsm["X_umap"][None]
    drawn = np.square(away).sum(-1).argmin(1).tolist()
    assert sorted(drawn) == list(range(adata.n_obs))
    from matplotlib.colors import to_hex

    wanted = dict(zip(["B", "NK", "T"], PALETTE, strict=False))
    assert [to_hex(c).upper() for c in cells.get_facecolors()] == [
        wanted[g] for g in adata.obs["label"].iloc[drawn]
    ]
    assert drawn != sorted(drawn)


def test_latent_draws_no_group_last(ax):
    groups = np.repeat(["first", "last"], 500)
    pl.latent(np.zeros((1000, 2)), groups, ax=ax)
    blue = (points(ax)[0].get_facecolors()[:, 2] > 0.5).astype(float)  # the first colour
    ranks = np.arange(1000)
    assert abs(ranks[blue == 1].mean() - ranks[blue == 0].mean()) < 100  # of ±500 in the order of rows
    assert ax.get_xlabel() == "dimension 1"


def test_latent_keeps_global_random_numbers(adata, model, ax):
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    pl.latent(adata, "label", ax=ax)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_latent_order_of_groups_is_that_of_the_categories_or_sorted(ax):
    xy = np.random.default_rng(0).normal(size=(6, 2))
    pl.latent(xy, pd.Categorical(["b", "a", "c"] * 2, categories=["c", "b", "a", "unused"]), ax=ax)
    assert labels_of(ax) == ["c", "b", "a"]
    pl.latent(xy, ["10", "9", "x"] * 2, ax=ax)
    assert labels_of(ax) == ["9", "10", "x"]
    pl.latent(xy, np.array([True, False, True] * 2), ax=ax)
    assert labels_of(ax) == ["False", "True"]


def test_latent_shows_cells_without_a_group(ax):
    pl.latent(np.eye(4, 2), pd.Series(["a", None, "b", "a"]), ax=ax)
    assert labels_of(ax) == ["a", "b", "no value"]


def test_latent_numbers_more_groups_than_colours(ax):
    xy = np.random.default_rng(0).normal(size=(75, 2))
    pl.latent(xy, [f"type {i % 25:02d}" for i in range(75)], ax=ax)
    assert [t.get_text() for t in ax.texts] == [str(i) for i in range(1, 26)]
    assert labels_of(ax)[-1] == "25  type 24"
    for i, text in enumerate(ax.texts):  # on a cell of that group
        assert (np.abs(xy[i::25] - np.array(text.get_position())).sum(1) < 1e-9).any()


def test_latent_palette(ax):
    pl.latent(np.eye(2), ["a", "b"], ax=ax, palette={"a": "#000000", "b": "#ffffff"})
    assert sorted(points(ax)[0].get_facecolors()[:, 0]) == [0, 1]
    with pytest.raises(KeyError, match="no colour for 'b'"):
        pl.latent(np.eye(2), ["a", "b"], ax=ax, palette={"a": "red"})


def test_latent_of_numbers(ax):
    values = np.r_[np.arange(1000.0), 1e9, np.nan]
    pl.latent(np.random.default_rng(0).normal(size=(1002, 2)), values, ax=ax, label="things")
    missing, cells = points(ax)
    assert (len(missing.get_offsets()), len(cells.get_offsets())) == (1, 1001)
    assert cells.get_clim() == pytest.approx(np.quantile(values[:-1], [0.01, 0.99]))
    assert sorted(cells.get_array()) == sorted(values[:-1])
    bars = [a for a in ax.figure.axes if a is not ax]
    assert [b.get_ylabel() for b in bars] == ["things"]


def test_latent_of_numbers_by_log1p_has_a_colour_bar_in_numbers(ax):
    values = np.random.default_rng(1).lognormal(3, 1, 500)
    pl.latent(np.random.default_rng(0).normal(size=(500, 2)), values, ax=ax, scale="log1p", vmin=0)
    (cells,) = points(ax)
    assert sorted(cells.get_array()) == pytest.approx(sorted(np.log1p(values)))
    (bar,) = [a for a in ax.figure.axes if a is not ax]
    shown = {
        float(t.get_text().replace(",", "")): y
        for t, y in zip(bar.get_yticklabels(), bar.get_yticks(), strict=True)
    }
    assert 0.0 in shown
    for number, height in shown.items():
        assert np.log1p(number) == pytest.approx(height)


@pytest.mark.parametrize("values", [np.zeros(5), np.full(5, np.nan), np.r_[0, 0, 0, 0, 9.0]])
def test_latent_of_constant_or_missing_numbers(ax, values):
    pl.latent(np.random.default_rng(0).normal(size=(5, 2)), values, ax=ax)
    ax.figure.canvas.draw()
    if np.ptp(values) > 0:  # mostly one value: the other still shows
        assert points(ax)[0].get_clim()[1] > 8


def test_latent_without_colour_or_legend(adata, model, ax):
    pl.latent(adata, ax=ax)
    pl.latent(adata, "age", ax=ax, legend=False)
    assert ax.get_legend() is None
    assert ax.figure.axes == [ax]


def test_latent_says_what_is_missing(adata, model):
    with pytest.raises(KeyError, match=r"no obsm\['X_pca'\]; there are .*'X_umap'"):
        pl.latent(adata, "label", basis="X_pca")
    with pytest.raises(KeyError, match="no column 'cluster'; it has 'batch'"):
        pl.latent(adata, "cluster")
    with pytest.raises(ValueError, match="3 values for 200 cells"):
        pl.latent(adata, [1, 2, 3])
    with pytest.raises(ValueError, match="two columns"):
        pl.latent(np.zeros((5, 1)), np.zeros(5))
    with pytest.raises(TypeError, match="names a column"):
        pl.latent(np.zeros((5, 2)), "label")


def test_ticks_are_round_numbers_inside():
    for low, high in [(0.0, 6.0), (5.6, 7.1), (0.0, 0.02), (2.0, 14.0), (0.0, 1.0)]:
        ticks = ticks_log1p(low, high)
        assert 2 <= len(ticks) <= 7
        assert ticks == sorted(ticks)
        assert all(low - 1e-6 <= np.log1p(t) <= high + 1e-6 for t in ticks)


def test_palette_is_safe_for_colour_blind_readers():
    # sRGB to linear; protanopia and deuteranopia by Machado et al. (2009), severity 1; distance in OKLab
    srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in PALETTE])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    protan = [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
    deutan = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    lms = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    lab = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    for seen in (np.eye(3), np.array(protan), np.array(deutan)):
        colours = np.cbrt(np.clip(linear @ seen.T, 0, 1) @ np.array(lms).T) @ np.array(lab).T
        apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)[np.triu_indices(20, 1)]
        assert apart.min() > 0.07  # black to white is 1


# -- expression ------------------------------------------------------------------------------------------


def test_expression_shows_the_models_values(model, adata):
    genes = ["gene_3", "gene_0", "gene_7", "gene_1"]
    axes = pl.expression(model, genes)
    assert [a.get_title() for a in axes] == genes
    wanted = np.log1p(model.get_normalized_expression(gene_list=genes, library_size=1e4, as_numpy=True))
    for i, ax in enumerate(axes):
        (cells,) = points(ax)
        assert sorted(cells.get_array()) == pytest.approx(sorted(wanted[:, i]), rel=1e-5)
        assert cells.get_clim() == pytest.approx((0, np.quantile(wanted[:, i], 0.99)), rel=1e-5)
    figure = axes[0].figure
    assert len(figure.axes) == 8  # a panel and a colour bar per gene, no empty panel
    assert {a.get_ylabel() for a in figure.axes} >= {"per 10,000 counts"}


def test_expression_of_other_cells(model, adata):
    some = adata[:50].copy()
    (ax,) = pl.expression(model, ["gene_2"], some)
    assert len(points(ax)[0].get_offsets()) == 50


def test_expression_says_what_is_wrong(model, adata):
    with pytest.raises(TypeError, match=r"\['gene_1'\]"):
        pl.expression(model, "gene_1")
    with pytest.raises(ValueError, match="empty"):
        pl.expression(model, [])
    with pytest.raises(KeyError, match="X_tsne"):
        pl.expression(model, ["gene_1"], basis="X_tsne")
    from matplotlib.figure import Figure

    with pytest.raises(ValueError, match=r"draws 2 panels; axes= holds 1"):
        pl.expression(model, ["gene_1", "gene_2"], axes=Figure().subplots())


# -- predictive check ------------------------------------------------------------------------------------


def test_predictive_check_shows_the_moments(model, adata):
    left, right = pl.predictive_check(model, n_samples=2, seed=3)
    x = adata.layers["counts"].toarray().astype(float)
    draws = model.posterior_predictive_sample(n_samples=2, seed=3)
    y = [d.toarray().astype(float) for d in draws]
    zeros = np.asarray(points(right)[0].get_offsets())
    np.testing.assert_allclose(zeros[:, 0], (x == 0).mean(0), atol=1e-12)
    np.testing.assert_allclose(zeros[:, 1], np.mean([(d == 0).mean(0) for d in y], axis=0), atol=1e-12)
    moments = np.asarray(points(left)[0].get_offsets())
    seen = np.stack([x.mean(0), x.var(0, ddof=1)], 1)
    replicated = np.stack([np.mean([d.mean(0) for d in y], 0), np.mean([d.var(0, ddof=1) for d in y], 0)], 1)
    both = np.concatenate([seen, replicated])
    np.testing.assert_allclose(np.sort(moments, axis=0), np.sort(both, axis=0), rtol=1e-6)
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert labels_of(left)[:2] == ["observed", "replicated"]
    text = right.texts[0].get_text()
    assert f"correlation {np.corrcoef(zeros.T)[0, 1]:.3f}" in text
    assert f"mean deviation {np.abs(zeros[:, 1] - zeros[:, 0]).mean():.3f}" in text
    assert right.get_xlim() == right.get_ylim()
    ratio = np.log2(replicated[:, 1] / seen[:, 1])
    assert f"median {2 ** np.median(ratio):.2f}" in left.texts[0].get_text()


def test_predictive_check_of_some_cells(model, adata):
    held_out = model.split["main"][1]
    _, right = pl.predictive_check(model, n_samples=1, indices=held_out)
    x = adata.layers["counts"].toarray()[held_out]
    np.testing.assert_allclose(np.asarray(points(right)[0].get_offsets())[:, 0], (x == 0).mean(0), atol=1e-12)
    _, right = pl.predictive_check(model, adata[:30].copy(), n_samples=1, max_cells=20)
    shares = np.asarray(points(right)[0].get_offsets()) * 20
    np.testing.assert_allclose(shares, np.round(shares), atol=1e-9)  # of 20 cells
    with pytest.raises(ValueError, match="at least two cells"):
        pl.predictive_check(model, indices=[0])
    with pytest.raises(ValueError, match="at least 1"):
        pl.predictive_check(model, n_samples=0)
