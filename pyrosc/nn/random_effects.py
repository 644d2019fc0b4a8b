"""Rows of categories as a hierarchy: drawn from a Normal that is learned from all of them."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrosc.nn.covariates import CategoryTable

_START = 0.3  # standard deviation of the guide's factors


class RandomEffects(nn.Module):
    """Latent rows e_c ~ Normal(μ, diag σ²) of categories c, with μ and σ learned, and their guide.

    After the last registered category comes one more row, that of a category not seen: its guide is the
    prior, so that it costs nothing in the bound and predicts what any further category may be.

    Parameters
    ----------
    site
        Name of the latent site, a global one.
    field
        Argument of the model whose codes index the rows.
    n_categories
        Number of registered categories.
    width
        Numbers in a row.
    key
        Column, where the field has several; None otherwise.

    References
    ----------
    Gelman and Hill. Data Analysis Using Regression and Multilevel/Hierarchical Models (2007), chapter 12.
    """

    def __init__(self, site: str, field: str, n_categories: int, width: int, key: str | None = None) -> None:
        super().__init__()
        self.site = site
        self.loc = CategoryTable(field, n_categories, (width,), key, nn.init.normal_)
        self.log_scale = CategoryTable(
            field, n_categories, (width,), key, lambda t: t.fill_(math.log(_START))
        )
        self.prior_loc = nn.Parameter(torch.zeros(width))
        self.prior_log_scale = nn.Parameter(torch.zeros(width))

    def _plate(self) -> Any:
        return pyro.plate(f"{self.site}_categories", self.loc.n_categories + 1, dim=-1)

    def prior(self) -> Tensor:
        """Sample the rows in the model, before its plate over cells: (..., n_categories + 1, width)."""
        with self._plate():
            law = dist.Normal(self.prior_loc, self.prior_log_scale.exp())
            return pyro.sample(self.site, law.to_event(1))

    def guide(self) -> Tensor:
        """Sample them in the guide."""
        loc = torch.cat([self.loc.all_rows(), self.prior_loc[None]])
        scale = torch.cat([self.log_scale.all_rows(), self.prior_log_scale[None]]).exp()
        with self._plate():
            return pyro.sample(self.site, dist.Normal(loc, scale).to_event(1))

    def means(self) -> Tensor:
        """Means of the guide, (n_categories + 1, width)."""
        return torch.cat([self.loc.all_rows(), self.prior_loc[None]])
