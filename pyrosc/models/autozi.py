"""AutoZI: which genes have more zeros than a negative binomial explains (Clivio et al., 2019)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from scipy import special
from torch import Tensor, nn

from pyrosc.data import Registry
from pyrosc.data.errors import one_of
from pyrosc.models.scvi import SCVI, GeneParameter
from pyrosc.nn import CategoryTable

#: δ is kept this far from 0 and 1, so that no logarithm of a float32 runs away.
_EDGE = 1e-6
#: Bounds of the parameters of q(δ), within which draws and gradients of a Beta are right in single precision.
_BOUNDS = (1e-2, 1e5)
_START = 0.5  # of these parameters, where those of the prior are learned
#: They range over orders of magnitude, which steps of Adam on their logarithms would take too long to cross.
_GAIN = 10.0


class AUTOZI(SCVI):
    """Automatic identification of zero-inflated genes.

    As `SCVI` with the ZINB likelihood, whose extra zeros a gene has or has not: δ_g ~ Beta(α0, β0) is the
    probability that an entry of gene g is *not* zero-inflated,
    x ~ δ NB(l ρ, θ) + (1 − δ) ZINB(l ρ, θ, π'), with π' = m + (1 − m) π and m the `minimal_dropout`. Which of
    the two laws an entry comes from is summed out: the sum is ZINB with zero inflation (1 − δ) π'. The guide
    is that of SCVI and q(δ_g) = Beta(α_g, β_g).

    Parameters
    ----------
    registry
        Made by `from_anndata`.
    zero_inflation
        δ per ``"gene"``, ``"gene-batch"`` or ``"gene-label"``.
    alpha_prior, beta_prior
        α0 and β0; None learns it from the genes (empirical Bayes).
    minimal_dropout
        Least probability m of an extra zero where there is zero inflation.
    **options
        Of `SCVI`; the likelihood is ``"zinb"``.

    References
    ----------
    Clivio, Lopez, Regier, Gayoso, Jordan, Yosef. Detecting zero-inflated genes in single-cell transcriptomics
    data. Machine Learning in Computational Biology (2019).
    """

    slots: ClassVar = {
        "z": "obsm/X_AutoZI",
        "library": "obs/autozi_log_library",
        "rho": "layers/autozi_normalized",
    }

    def __init__(
        self,
        registry: Registry,
        zero_inflation: Literal["gene", "gene-batch", "gene-label"] = "gene",
        alpha_prior: float | None = 0.5,
        beta_prior: float | None = 0.5,
        minimal_dropout: float = 0.01,
        **options: Any,
    ) -> None:
        one_of("zero_inflation", zero_inflation, ("gene", "gene-batch", "gene-label"))
        if options.get("gene_likelihood", "zinb") != "zinb":
            raise ValueError("AUTOZI asks which genes are zero-inflated: its gene_likelihood is 'zinb'")
        if zero_inflation == "gene-label" and not registry.given("labels"):
            raise ValueError("zero_inflation='gene-label' needs labels: labels_key=")
        for name, value in {"alpha_prior": alpha_prior, "beta_prior": beta_prior}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is a positive number, or None to learn it; got {value}")
        if not 0 < minimal_dropout < 1:
            raise ValueError(f"minimal_dropout is between 0 and 1; got {minimal_dropout}")
        super().__init__(registry, **options)
        self.zero_inflation, self.minimal_dropout = zero_inflation, minimal_dropout
        self.alpha, self.beta = self._parameter(), self._parameter()
        self.start = alpha_prior or _START, beta_prior or _START
        self.log_prior = nn.ParameterDict()
        for name, value in {"alpha": alpha_prior, "beta": beta_prior}.items():
            log = torch.tensor(math.log(_START if value is None else value))
            self.log_prior[name] = nn.Parameter(log, requires_grad=value is None)

    def _parameter(self) -> nn.Module:
        """A number per gene, or a row of them per category, for a parameter of q(δ); see `concentrations`."""
        n_genes = self.registry.n_vars()
        if self.zero_inflation == "gene":
            return GeneParameter(n_genes)
        field = self.zero_inflation.removeprefix("gene-").replace("label", "labels")
        spare = 1 if field == "labels" else 0  # for unlabelled cells
        return CategoryTable(field, self.registry.n_categories(field) + spare, (n_genes,))

    # -- the math -------------------------------------------------------------------------------------

    def _global_prior(self) -> Tensor:
        """δ, (g,), or (categories, g)."""
        alpha, beta = (self.log_prior[k].exp().expand(self.registry.n_vars()) for k in ("alpha", "beta"))
        with self._categories():
            return pyro.sample("delta", dist.Beta(alpha, beta).to_event(1))

    def _global_guide(self) -> None:
        with self._categories():
            pyro.sample("delta", dist.Beta(*self.concentrations()).to_event(1))

    def _categories(self) -> Any:
        """The plate over what has a δ per gene of its own."""
        if isinstance(self.alpha, CategoryTable):
            return pyro.plate("categories", self.alpha.n_categories, dim=-1)
        return nullcontext()

    def concentrations(self) -> tuple[Tensor, Tensor]:
        """α and β of q(δ), each (g,) or (categories, g)."""
        raw = [p.all_rows() if isinstance(p, CategoryTable) else p() for p in (self.alpha, self.beta)]
        logs = (math.log(s) + _GAIN * r for s, r in zip(self.start, raw, strict=True))
        alpha, beta = (log.clamp(*map(math.log, _BOUNDS)).exp() for log in logs)
        return alpha, beta

    def _zi_logits(
        self, decoded: Tensor | None, shared: Tensor | None, batch: Tensor, labels: Tensor
    ) -> Tensor:
        """Logits of (1 − δ) π', as the ratio of two sums of positive terms: nothing cancels."""
        assert decoded is not None
        assert shared is not None
        if self.zero_inflation == "gene-batch":
            shared = shared[..., batch, :]
        elif self.zero_inflation == "gene-label":
            shared = shared[..., self._label_rows(labels), :]
        delta, least = shared.clamp(_EDGE, 1 - _EDGE), self.minimal_dropout
        extra = (1 - delta) * (least + (1 - least) * decoded.sigmoid())
        none = delta + (1 - delta) * (1 - least) * (-decoded).sigmoid()
        return extra.log() - none.log()

    # -- results --------------------------------------------------------------------------------------

    def get_alphas_betas(self) -> pd.DataFrame:
        """Parameters of q(δ) = Beta(alpha, beta), δ being the probability of *no* zero inflation.

        Returns
        -------
        pandas.DataFrame
            A row per gene (and category): ``gene``, the column of the batches or labels where
            `zero_inflation` is per category, ``alpha``, ``beta``, and those of the prior, ``alpha_prior``,
            ``beta_prior``.
        """
        genes = list(self.registry.var_names())
        with torch.no_grad():
            alpha, beta = (p.cpu().numpy() for p in self.concentrations())
        table = pd.DataFrame({"gene": genes})
        if isinstance(self.alpha, CategoryTable):
            field = self.alpha.field
            names = self.registry.categories(field)
            alpha, beta = alpha[: len(names)], beta[: len(names)]  # without the unlabelled cells' row
            column = next(iter(self.registry.keys(field)), field)
            table = pd.DataFrame({"gene": np.tile(genes, len(names)), column: np.repeat(names, len(genes))})
        table["alpha"], table["beta"] = alpha.ravel(), beta.ravel()
        for name in ("alpha", "beta"):
            table[f"{name}_prior"] = self.log_prior[name].detach().exp().item()
        return table

    def get_zero_inflation(self) -> pd.DataFrame:
        """How likely each gene is zero-inflated.

        Returns
        -------
        pandas.DataFrame
            A row per gene (and category), as in `get_alphas_betas`, with ``probability``: that most
            entries are zero-inflated, q(δ < 0.5); and ``delta``: the mean of δ.
        """
        table = self.get_alphas_betas()
        alpha, beta = table["alpha"].to_numpy(float), table["beta"].to_numpy(float)
        table["probability"] = special.betainc(alpha, beta, 0.5)
        table["delta"] = alpha / (alpha + beta)
        return table.drop(columns=["alpha_prior", "beta_prior"])

    def gene_results(self) -> dict[str, pd.Series | pd.DataFrame]:
        """Probability of zero inflation of each gene (in each category)."""
        table = self.get_zero_inflation()
        slot = "var/autozi_zero_inflation"
        if isinstance(self.alpha, CategoryTable):
            column = table.columns[1]
            return {slot: table.pivot(index="gene", columns=column, values="probability")}
        return {slot: table.set_index("gene")["probability"]}
