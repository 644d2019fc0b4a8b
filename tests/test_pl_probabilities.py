"""Mean probabilities of predicted classes by group."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pyrosc import pl


@pytest.fixture
def soft():
    rng = np.random.default_rng(0)
    values = rng.dirichlet([1.0, 1.0, 1.0], 30)
    return pd.DataFrame(values, index=[f"c{i}" for i in range(30)], columns=["B", "CD4 T", "NK"])


def test_rows_are_the_means_of_groups(soft):
    groups = pd.Series(np.arange(30) % 2, index=soft.index, name="cluster")
    ax = pl.probabilities(soft, groups.sample(frac=1, random_state=0))  # matched by name
    expected = soft.groupby(groups).mean().to_numpy()
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0 (15)", "1 (15)"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["B", "CD4 T", "NK"]
    assert ax.get_ylabel() == "cluster"
    assert ax.texts[0].get_text() == f"{expected[0, 0]:.2f}"


def test_cells_without_a_group_are_left_out(soft):
    groups = ["a"] * 10 + [None] * 20
    ax = pl.probabilities(soft, groups)
    np.testing.assert_allclose(ax.images[0].get_array(), soft.iloc[:10].mean().to_numpy()[None])
    assert ax.get_title() == "10 cells"


def test_other_cells_are_refused(soft):
    with pytest.raises(ValueError, match="groups lack 30 of the 30 cells"):
        pl.probabilities(soft, pd.Series(1, index=range(30)))
    with pytest.raises(ValueError, match="3 groups for 30 cells"):
        pl.probabilities(soft, ["a", "b", "c"])
