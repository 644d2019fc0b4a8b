"""Cells and models that the tests of differential expression share."""

import warnings

import pytest
from toy import make_adata
from toy_expression import Smooth

from pyrosc import SCVI


@pytest.fixture(scope="module")
def adata():
    return make_adata(200, 40)


@pytest.fixture(scope="module")
def smooth(adata):
    return Smooth.from_anndata(adata, batch_key="batch")


@pytest.fixture(scope="module")
def scvi(adata):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return SCVI.from_anndata(adata, batch_key="batch", n_hidden=16).fit(15, progress=False)
