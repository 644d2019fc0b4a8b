"""Volcano plots and heat maps: what is in the axes."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from toy import make_adata

import pyrosc
from pyrosc import pl
from pyrosc.pl._style import BLUE, ORANGE, PALE


@pytest.fixture(scope="module")
def model():
    return pyrosc.SCVI.from_anndata(make_adata(), n_hidden=16).fit(6, progress=False)


@pytest.fixture(scope="module")
def de(model):
    return model.differential_expression(groupby="label")


@pytest.fixture(autouse=True)
def plt():
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def test_a_volcano_shows_every_gene_where_it_is(de):
    axes = pl.volcano(de, n_labels=3)
    assert [ax.get_title() for ax in axes] == ["B vs rest", "NK vs rest", "T vs rest"]
    table = de[de["group1"] == "B"]
    height = -np.log10(np.maximum(1 - table["proba_de"], 1e-12))
    others, up, down = (c for c in axes[0].collections[:3])
    for dots, chosen, colour in (
        (others, ~table["is_de_fdr"], PALE),
        (up, table["is_de_fdr"] & (table["lfc_mean"] > 0), ORANGE),
        (down, table["is_de_fdr"] & (table["lfc_mean"] < 0), BLUE),
    ):
        expected = np.stack([table["lfc_mean"][chosen], height[chosen]], 1)
        np.testing.assert_allclose(dots.get_offsets(), expected, rtol=1e-5)
        if chosen.any():
            assert tuple(dots.get_facecolors()[0]) == to_rgba(colour)
    named = {t.get_text() for t in axes[0].texts} & set(table.index)
    assert 0 < len(named) <= 3
    assert named <= set(table.index[:3])
    assert sorted(line.get_xdata()[0] for line in axes[0].lines) == [-0.25, 0.25]


def test_a_volcano_of_what_is_asked_for(de, model, plt):
    _, given = plt.subplots()
    wanted = de[de["group1"] == "T"].index[-1]
    (ax,) = pl.volcano(de, "T vs rest", axes=given, n_labels=0, genes=[wanted, "no such gene"])
    assert ax is given
    assert wanted in {t.get_text() for t in ax.texts}
    pairs = model.differential_expression(groupby="label", group1="B", group2="T", pairs=True, n_samples=50)
    (ax,) = pl.volcano(pairs)  # without calls there are no colours
    assert len(ax.collections[0].get_offsets()) == 40
    with pytest.raises(KeyError, match="no comparisons"):
        pl.volcano(de, "C vs rest")
    with pytest.raises(ValueError, match="draws 3 panels"):
        pl.volcano(de, axes=[given])


def test_a_heat_map_shows_the_groups_means(de):
    ax = pl.heatmap(de, 2, values="log2")
    groups = [t.get_text() for t in ax.get_xticklabels()]
    genes = [t.get_text() for t in ax.get_yticklabels()]
    assert groups == ["B", "NK", "T"]
    notes = de.attrs["differential_expression"]["comparisons"]
    columns = {}
    for g in groups:
        scale = de[de["group1"] == g]["scale1"]
        columns[g] = np.log2(scale + notes[f"{g} vs rest"]["pseudocount"])
    means = pd.DataFrame(columns).loc[genes]
    shown = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(shown, means.sub(means.mean(axis=1), axis=0), atol=1e-6)
    for i, g in enumerate(groups):  # led by the genes of each group in turn
        raised = de[(de["group1"] == g) & de["is_de_fdr"] & (de["lfc_lower"] > 0)]
        if len(raised):
            assert raised.index[0] in genes[: 2 * (i + 1)]
    z = np.asarray(pl.heatmap(de, 2).images[0].get_array())
    np.testing.assert_allclose(z.std(1, ddof=1), 1, rtol=1e-5)


def test_a_heat_map_of_pairs_and_strata(model):
    with pytest.warns(pyrosc.DataWarning):
        one = model.differential_expression(groupby="label", group1="B", group2="T")
    ax = pl.heatmap(one, 3)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["B", "T"]
    signs = np.sign(np.asarray(ax.images[0].get_array())[:, 0])
    assert {-1, 1} == set(signs)  # raised and lowered genes
    with pytest.warns(pyrosc.DataWarning):
        strata = model.differential_expression(groupby="batch", group1="batch_0", within="label")
    ax = pl.heatmap(strata, genes=["gene_3", "gene_1"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["gene_3", "gene_1"]
    assert [t.get_text() for t in ax.get_xticklabels()][:2] == ["batch_0 in B", "rest in B"]
    with pytest.raises(KeyError, match="no genes"):
        pl.heatmap(one, genes=["ACTB"])
    with pytest.raises(ValueError, match="values is one of"):
        pl.heatmap(one, values="t")
    with pytest.raises(ValueError, match="n_genes is at least 1"):
        pl.heatmap(one, 0)
    nothing = one.assign(is_de_fdr=False)
    with pytest.raises(ValueError, match="no gene of the table is raised"):
        pl.heatmap(nothing)
