"""LDVAE: scVI with a linear decoder, whose weights say what each factor does to a gene (Svensson, 2020)."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrosc.data import Dataset, Registry
from pyrosc.data.errors import one_of
from pyrosc.models.scvi import SCVI, Decoded
from pyrosc.nn import CovariateEffects, Covariates, CovariateSpec, FlatBatchNorm
from pyrosc.nn.layers import Norm
from pyrosc.train.plan import Plan


class LinearSCVI(SCVI):
    """Single-cell variational inference with a linear decoder: factors that are read gene by gene.

    z ~ Normal(0, I); ρ = softmax(c + W z + E[batch] + …); x ~ NB(l ρ, θ), l the library size. W, (g, k), are
    the loadings: how much the log expression of a gene moves with a factor. The guide is that of `SCVI`; with
    ``bayesian=True`` the loadings are latent too, W_gk ~ Normal(0, σ_k), and so is their guide.

    Parameters
    ----------
    registry
        Made by `from_anndata`.
    bayesian
        Infer the loadings' posterior, Normal and independent, for credible intervals.
    prior_scale
        Standard deviation σ of the prior of Bayesian loadings; None learns one per factor from the data
        (empirical Bayes), so that factors that are not needed are switched off.
    decoder_norm
        ``"none"``: an intercept c per gene; ``"batch"``: batch normalisation of W z + E[batch] + …, with a
        scale and shift per gene, as in the authors' implementation.
    gene_likelihood, use_observed_lib_size
        As in `SCVI`, with other defaults. The zero inflation of ``"zinb"`` is a linear map of its own.
    **options
        Of `SCVI`; `n_layers`, `n_hidden` and `norm` are those of the encoder.

    References
    ----------
    Svensson, Gayoso, Yosef, Pachter. Interpretable factor models of single-cell RNA-seq via variational
    autoencoders. Bioinformatics 36 (2020).
    """

    slots: ClassVar = {
        "z": "obsm/X_LDVAE",
        "library": "obs/ldvae_log_library",
        "rho": "layers/ldvae_normalized",
    }
    plan = Plan(lr=5e-3)

    scale_head: LinearHead  # type: ignore[assignment]
    zi_head: LinearHead | None  # type: ignore[assignment]

    def __init__(
        self,
        registry: Registry,
        bayesian: bool = False,
        prior_scale: float | None = None,
        decoder_norm: Literal["none", "batch"] = "none",
        gene_likelihood: Literal["zinb", "nb", "poisson", "normal"] = "nb",
        use_observed_lib_size: bool = False,
        **options: Any,
    ) -> None:
        one_of("decoder_norm", decoder_norm, ("none", "batch"))
        if bayesian and decoder_norm == "batch":
            raise ValueError(
                "bayesian=True puts a prior on the loadings, which batch normalisation would scale away; "
                "use decoder_norm='none'"
            )
        if prior_scale is not None and not bayesian:
            raise ValueError("prior_scale is of the loadings' prior; it needs bayesian=True")
        if prior_scale is not None and prior_scale <= 0:
            raise ValueError(f"prior_scale is a standard deviation, above 0; got {prior_scale}")
        self.bayesian, self.decoder_norm = bayesian, decoder_norm
        super().__init__(
            registry,
            gene_likelihood=gene_likelihood,
            use_observed_lib_size=use_observed_lib_size,
            **options,
        )
        if bayesian:
            self.log_loading_scale = nn.Parameter(torch.full_like(self.scale_head.weight, np.log(0.05)))
            start = torch.full((self.n_latent,), float(np.log(prior_scale or self.n_latent**-0.5)))
            self.log_prior_scale = nn.Parameter(start, requires_grad=prior_scale is None)

    def _build_decoder(self, n_latent: int, n_hidden: int, n_layers: int, inject: bool, norm: Norm) -> int:
        size = (n_latent, self.registry.n_vars(), self.spec, self.decoder_norm == "batch")
        self.scale_head = LinearHead(*size)
        self.zi_head = LinearHead(*size) if self.gene_likelihood == "zinb" else None
        return n_latent

    # -- the math -------------------------------------------------------------------------------------

    def _global_prior(self) -> Tensor | None:
        """The loadings W, (g, k), where they are latent."""
        if not self.bayesian:
            return None
        loc = torch.zeros_like(self.log_prior_scale)
        with pyro.plate("genes", self.registry.n_vars(), dim=-1):
            return pyro.sample("loadings", dist.Normal(loc, self.log_prior_scale.exp()).to_event(1))

    def _global_guide(self) -> None:
        if self.bayesian:
            q = dist.Normal(self.scale_head.weight, self.log_loading_scale.exp())
            with pyro.plate("genes", self.registry.n_vars(), dim=-1):
                pyro.sample("loadings", q.to_event(1))

    def _decode(self, z: Tensor, covariates: Covariates, shared: Tensor | None) -> Decoded:
        zi_logits = None if self.zi_head is None else self.zi_head(z, covariates)
        return Decoded(self.scale_head(z, covariates, shared), zi_logits, z)

    def initialize(self, data: Dataset | dict[str, Dataset]) -> None:
        """As in `SCVI`; the standard deviations of Bayesian loadings by the counts that speak of a gene."""
        super().initialize(data)
        if self.bayesian:
            assert isinstance(data, Dataset)
            mean = torch.as_tensor(data.summary("x").gene_sums / data.n_obs, dtype=torch.float32)
            information = data.n_obs * mean / (1 + mean)  # of NB counts about a log mean, where θ = 1
            with torch.no_grad():
                precision = information.unsqueeze(-1) + (-2 * self.log_prior_scale).exp()
                self.log_loading_scale.copy_(-0.5 * precision.log())

    # -- results --------------------------------------------------------------------------------------

    def get_loadings(self, credible_interval: float | None = None) -> pd.DataFrame:
        """What each factor does to the log expression of each gene, normalisation folded in.

        Between two cells of one batch and covariates, log ρ differs by ``loadings @ (z1 - z2)`` and a
        constant over genes.

        Parameters
        ----------
        credible_interval
            Probability that an interval holds, such as 0.9; of models with ``bayesian=True``.

        Returns
        -------
        pandas.DataFrame
            (g, k) genes by factors ``Z_0``, ``Z_1``, …, in the order of the latent space: posterior means
            where the loadings are Bayesian. With `credible_interval`, a row per gene and factor: ``gene``,
            ``factor``, ``loading`` (the mean), ``sd``, ``lower``, ``upper``, ``excludes_zero``. The bounds
            are the exact quantiles of the guide's Normal; draws are ``posterior("loadings", n_samples=)``.

        Raises
        ------
        ValueError
            If intervals are asked of loadings that are not Bayesian.
        """
        genes = pd.Index(self.registry.var_names(), name="gene")
        factors = pd.Index([f"Z_{i}" for i in range(self.n_latent)], name="factor")
        with torch.no_grad():
            means = pd.DataFrame(self.scale_head.loadings().cpu().numpy(), index=genes, columns=factors)
        if credible_interval is None:
            return means
        if not self.bayesian:
            raise ValueError(
                "these loadings are point estimates; make the model with bayesian=True for credible intervals"
            )
        if not 0 < credible_interval < 1:
            raise ValueError(f"credible_interval is a probability between 0 and 1; got {credible_interval}")
        tidy = means.rename_axis(columns="factor").reset_index().melt("gene", value_name="loading")
        tidy["sd"] = self.log_loading_scale.detach().exp().cpu().numpy().T.ravel()
        reach = NormalDist().inv_cdf(0.5 + credible_interval / 2)
        tidy["lower"] = tidy["loading"] - reach * tidy["sd"]
        tidy["upper"] = tidy["loading"] + reach * tidy["sd"]
        tidy["excludes_zero"] = (tidy["lower"] > 0) | (tidy["upper"] < 0)
        return tidy

    def gene_results(self) -> dict[str, pd.Series | pd.DataFrame]:
        """The loadings."""
        return {"varm/LDVAE_loadings": self.get_loadings()}


class LinearHead(nn.Module):
    """Linear map of the latent space and the covariates to the genes, with an intercept or batch norm.

    Parameters
    ----------
    n_latent, n_genes
        Widths.
    covariates
        Covariates, which add a row per category to the genes.
    batch_norm
        Normalise each gene over the cells of a minibatch; its shift is then the intercept.
    """

    def __init__(self, n_latent: int, n_genes: int, covariates: CovariateSpec, batch_norm: bool) -> None:
        super().__init__()
        bound = n_latent**-0.5
        self.weight = nn.Parameter(torch.empty(n_genes, n_latent).uniform_(-bound, bound))
        self.effects = CovariateEffects(covariates, n_genes, n_latent)
        self.norm = FlatBatchNorm(n_genes, eps=1e-3) if batch_norm else None
        self.intercept = None if batch_norm else nn.Parameter(torch.zeros(n_genes))

    @property
    def bias(self) -> Tensor:
        """What is added to each gene last, (g,)."""
        return self.intercept if self.norm is None else self.norm.bias  # type: ignore[return-value]

    def loadings(self) -> Tensor:
        """Weights with the normalisation folded in, (g, k)."""
        if self.norm is None:
            return self.weight
        norm: Any = self.norm
        return self.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).unsqueeze(-1)

    def forward(self, z: Tensor, covariates: Covariates, weight: Tensor | None = None) -> Tensor:
        """(..., k) to (..., g); `weight`, (..., g, k), takes the place of the map's own."""
        weight = self.weight if weight is None else weight
        h = z @ weight.mT + self.effects(covariates)
        return h + self.intercept if self.norm is None else self.norm(h)
