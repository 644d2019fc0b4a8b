"""Stereoscope's single cells: profiles of cell types (Andersson et al., 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyro
import scipy.sparse as sp
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional as F

from pyrosc.data import Counts, Dataset, Labels, Registry
from pyrosc.distributions import NegativeBinomial
from pyrosc.models.base import Model
from pyrosc.nn import CategoryTable
from pyrosc.train import Plan


class RNAStereoscope(Model):
    """The single-cell half of Stereoscope: an expression profile of each cell type.

    x_ng ~ NB(total l_n softplus(W_{y(n) g}), logits o_g), l the cell's total count and y its type: a
    negative binomial with mean λ e^o and inverse dispersion λ = l softplus(W). W and o are fitted by maximum
    likelihood on all labelled cells; cells without a label do not count.

    Parameters
    ----------
    registry
        Made by `from_anndata`, which needs ``labels_key=``.

    References
    ----------
    Andersson, Bergenstråhle, Asp, ... Lundeberg. Single-cell and spatial transcriptomics enables
    probabilistic inference of cell type topography. Communications Biology 3 (2020).
    """

    vectorized = True
    plan = Plan(steps=1000, min_epochs=10, max_epochs=400, lr=0.1, warmup=0.0, train_size=1.0)

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        if not registry.given("labels"):
            raise ValueError("RNAStereoscope needs the type of each cell: labels_key=, a column of obs")
        n_genes = registry.n_vars()
        self.W = CategoryTable("labels", registry.n_categories("labels"), (n_genes,), init=nn.init.normal_)
        self.o = nn.Parameter(torch.zeros(n_genes))

    def model(self, x: Counts, labels: Labels) -> None:
        """p(x | y): x (n, g) counts, labels (n,) codes."""
        log_profile = F.embedding(labels.clamp(min=0), _log_softplus(self.W.all_rows()))
        known: Any = labels >= 0
        with self.cells(x), poutine.mask(mask=known):
            log_total = x.sum(-1, keepdim=True).log() + log_profile
            pyro.sample("x", law_of(log_total, self.o), obs=x)

    def guide(self, x: Counts, labels: Labels) -> None:
        """Nothing is latent."""

    def initialize(self, data: Dataset | dict[str, Dataset]) -> None:
        """Moments: profiles from the types' mean shares, e^o from the variance beyond the mean."""
        assert isinstance(data, Dataset)
        codes, library = data.codes("labels"), data.summary("x").cell_sums
        member = (codes == np.arange(self.W.n_categories)[:, None]).astype(float)  # (c, n)
        first: Any = 0.0
        second: Any = 0.0
        crossed: Any = 0.0
        for start, block in data.matrices["x"].chunks():
            x = sp.csr_matrix(block).astype(np.float64)
            here = slice(start, start + x.shape[0])
            first = first + member[:, here] @ x
            crossed = crossed + (member * library)[:, here] @ x
            second = second + member.sum(0)[here] @ x.multiply(x)
        total, squared = member @ library, member @ library**2
        overall = np.maximum(first.sum(0), 0.5) / total.sum()
        # a type is taken to hold one more cell of average profile: no rate starts at zero
        rate = (first + total.sum() / len(library) * overall) / (total + total.sum() / len(library))[:, None]
        mean = np.maximum(total @ rate, 1e-8)
        variance = second - 2 * (rate * crossed).sum(0) + squared @ rate**2
        odds = np.clip(variance / mean - 1, 0.02, 50.0)
        with torch.no_grad():
            self.o.copy_(torch.as_tensor(np.log(odds)))
            self.W.rows.copy_(torch.as_tensor(np.log(np.expm1(rate / odds))))

    def get_profiles(self) -> pd.DataFrame:
        """Expected share of each gene in a cell's counts, by type: e^o softplus(W).

        Returns
        -------
        pandas.DataFrame
            (types, genes).
        """
        with torch.no_grad():
            values = (self.o.exp() * F.softplus(self.W.all_rows())).cpu().numpy()
        names = list(self.registry.categories("labels"))
        return pd.DataFrame(values, index=names, columns=list(self.registry.var_names()))


def law_of(log_total: Tensor, logits: Tensor) -> Any:
    """NB(total, logits) as the law with mean total · e^logits and inverse dispersion total."""
    return NegativeBinomial(log_mean=log_total + logits, log_inverse_dispersion=log_total).to_event(1)


def _log_softplus(x: Tensor) -> Tensor:
    """log softplus(x), which is x itself far below zero."""
    return torch.where(x < -15, x, F.softplus(x.clamp(min=-15)).log())
