"""Genes of several data sets are matched by name, and by spelling where asked."""

import numpy as np
import pytest
from toy import make_adata
from toy_models import TwoSources

from pyrosc import DataError
from pyrosc.data.genes import shared_genes


def renamed(adata, names):
    adata.var_names = list(names)
    return adata


def test_sources_are_restricted_to_shared_genes_in_one_order():
    seq, spatial = make_adata(30, 12), make_adata(30, 12, seed=1)
    renamed(spatial, [f"GENE_{i}" for i in range(12)][::-1])
    spatial = spatial[:, :10].copy()  # GENE_11 … GENE_2
    with pytest.raises(DataError, match=r"share 0 of the 12 genes of 'seq'.*more match when case is ignored"):
        TwoSources.from_anndatas({"seq": seq, "spatial": spatial}, genes="shared")
    model = TwoSources.from_anndatas({"seq": seq, "spatial": spatial}, genes="shared", ignore_case=True)
    assert model.registries["seq"].var_names() == tuple(f"gene_{i}" for i in range(2, 12))
    assert model.registries["spatial"].var_names() == tuple(f"GENE_{i}" for i in range(2, 12))
    found = model.datasets["spatial"][np.arange(30)]["y"]
    np.testing.assert_array_equal(found, spatial.X.toarray()[:, ::-1])


def test_genes_that_case_tells_apart_are_named():
    names = {"a": ["Tp53", "TP53", "LYZ"], "b": ["tp53"]}
    assert shared_genes({"a": ["LYZ", "TP53"], "b": ["TP53", "x"]}) == {"a": ["TP53"], "b": ["TP53"]}
    with pytest.raises(DataError, match="'a' has genes 'Tp53' and 'TP53', which are one if case is ignored"):
        shared_genes(names, ignore_case=True)
    with pytest.raises(DataError, match="share 1 of the 3 genes of 'a', and at least 2 are needed"):
        shared_genes({"a": ["x", "y", "z"], "b": ["y"]}, at_least=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"genes": "common"}, "genes is 'shared' or a list"), ({"ignore_case": True}, "of genes='shared'")],
)
def test_wrong_choices_are_refused(options, message):
    two = {"seq": make_adata(30, 12), "spatial": make_adata(30, 12)}
    with pytest.raises(ValueError, match=message):
        TwoSources.from_anndatas(two, **options)
