"""What the author of a model may write, with what holds where nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrosc.data import MAIN, Dataset, Registry
from pyrosc.infer.elbo import PathwiseELBO
from pyrosc.train.plan import Plan


class Hooks(nn.Module):
    """Attributes and methods of a model that are its author's; `Model` says what the attributes mean."""

    elbo: ELBO = PathwiseELBO()
    slots: ClassVar[Mapping[str, str]] = {}
    annealed: tuple[str, ...] | None = None
    plan: Plan = Plan()
    vectorized: ClassVar[bool] = False
    latent: ClassVar[str] = "z"
    expression: ClassVar[str] = "rho"
    effect_scale: str = "lfc"
    features: ClassVar[Mapping[str, str]] = {}
    takes_means: ClassVar[bool] = True
    recoded: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[str | None] = None
    positive: ClassVar[str | None] = None

    registries: dict[str, Registry]
    auto_guide: nn.Module

    @property
    def registry(self) -> Registry:
        """The registry of a model of one data source."""
        if MAIN not in self.registries:
            raise AttributeError(f"{type(self).__name__} has several registries: {sorted(self.registries)}")
        return self.registries[MAIN]

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Generative model in Pyro primitives."""
        raise NotImplementedError(f"{type(self).__name__} must define model(self, x: Counts, ...)")

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """Variational posterior in Pyro primitives; by default encoders made by `Amortized`."""
        return self.auto_guide(*args, **kwargs)

    def initialize(self, data: Dataset | dict[str, Dataset]) -> None:
        """Data-dependent starting values; called once by `from_anndata`, never by `load`."""

    def initialize_query(self, data: Dataset) -> None:
        """Data-dependent values of the categories that a query brings; called once by `pyrosc.surgery`.

        Their rows are at the mean of the others already, and come after those (`CategoryTable.row`).
        """

    def starting_values(self) -> dict[str, Tensor]:
        """Starting values of latent sites, by name, for guides made from the model and for MCMC."""
        return {}

    def finish(self) -> None:
        """Called at the end of every `fit`, with the weights that are kept: what is estimated from a trained
        model (a temperature, a rate) goes into its buffers here."""

    def label_names(self) -> Sequence[str]:
        """Names of the values of the `label` site; by default the categories of the labels."""
        return self.registry.categories("labels")

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities (n, k) of the `label` site as `predict` shows them; by default those of the model."""
        return probabilities

    def annotated(self, site: str, values: np.ndarray, adata: Any, batch_size: int) -> np.ndarray:
        """Values of a local site for cells of `adata`, as `annotate` writes them; by default as they are."""
        return values

    def columns(self, site: str) -> Sequence[str] | None:
        """Names of the columns of a local site's values, which `annotate` writes with them; None for none."""
        return None

    def support(self) -> dict[str, str]:
        """What the likelihood takes, per counts field: ``"counts"`` (default), ``"panel"`` (counts of a few
        genes, of which a cell may have none) or ``"real"``."""
        return {}

    def gene_results(self) -> dict[str, pd.Series | pd.DataFrame]:
        """Results per gene, indexed by gene, by the place where `annotate` puts them: "var/…" or "varm/…"."""
        return {}

    def auxiliary(
        self, batch: dict[str, Tensor], sites: dict[str, Tensor], step: int, kl_weight: float
    ) -> dict[str, Tensor]:
        """Further objectives by name, from the site values of the pass that the ELBO was taken on."""
        return {}

    #: Auxiliary objectives that own a submodule: name of the objective to attribute name. Its parameters
    #: are moved by that objective alone, in a step of their own.
    owners: ClassVar[Mapping[str, str]] = {}

    #: Factors of the learning rate by submodule: free parameters whose scale is not that of a network's
    #: weights (a dispersion per gene) have further to go in as many steps.
    rates: Mapping[str, float] = {}

    #: Names of submodules that weight decay (`Plan.weight_decay`) leaves alone.
    undecayed: tuple[str, ...] = ()
