"""totalVI: RNA and surface proteins of the same cells (Gayoso et al., Nature Methods 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrosc.data import (
    Batch,
    CategoricalCovariates,
    ContinuousCovariates,
    Counts,
    Dataset,
    Labels,
    Protein,
    ProteinMask,
    Registry,
    SizeFactor,
)
from pyrosc.data.errors import one_of
from pyrosc.distributions import NegativeBinomialMixture
from pyrosc.models.protein_counts import background_prior, starting_means
from pyrosc.models.results import Indices
from pyrosc.models.scvi import SCVI, Decoded, GeneParameter
from pyrosc.nn import CategoryTable, CovariateEffects, Covariates, CovariateSpec, RandomEffects
from pyrosc.nn.adversary import CategoryClassifier
from pyrosc.nn.covariates import of_cells
from pyrosc.nn.layers import MLP, Norm
from pyrosc.tools.correlation import feature_correlation
from pyrosc.tools.proteins import foreground_probability, normalized_protein, panels
from pyrosc.train.plan import Plan

if TYPE_CHECKING:
    from anndata import AnnData

_TINY = 1e-8


class TOTALVI(SCVI):
    """Total variational inference: one latent space of RNA and protein counts (CITE-seq).

    z ~ Normal(0, I); x ~ NB(l ρ, θ), ρ = softmax f(z, batch, covariates), as in `SCVI`. Of protein t in cell
    n, of batch s: log b ~ Normal(α_ts, β_ts) is its background, and with probability π(z) its count is
    NB(e_ts b, φ), else NB(e_ts b r(z), φ), r ≥ 1; e_ts is the efficiency of the staining. The guide is q(z |
    x, y) q(log b | z). Proteins that were not measured in a cell are left out of its likelihood, and so are
    their backgrounds.

    Parameters
    ----------
    registry
        Made by `from_anndata`.
    n_hidden, n_latent, n_layers_encoder, n_layers_decoder, dropout_rate
        Width of the hidden layers and of the latent space, depth, and dropout of the encoder.
    gene_likelihood
        ``"nb"`` or ``"zinb"``.
    protein_dispersion
        Inverse dispersion φ per ``"protein"``, ``"protein-batch"`` or ``"protein-label"``.
    background_prior
        Starting values of α and β: ``"empirical"``, from a mixture of two Normals fitted within each of 100
        cells per batch across its proteins; ``"none"``: α = 3, β = 1. None: empirical with more than 10
        proteins.
    adversarial
        Train a classifier of the batch from z, which the encoder learns to deceive during the warm-up (weight
        1 − that of the KL). None: where the measured proteins differ between batches.
    encode_covariates, norm, **options
        As in `SCVI`.
    reference_objective
        The objective of the authors' implementation, for comparisons: the protein likelihood has the weight
        of the KL, the prior of e counts once per cell (as a LogNormal density of e), and 1e-3 log σ(logit π)
        is added.

    References
    ----------
    Gayoso, Steier, Lopez, Regier, Nazor, Streets, Yosef. Joint probabilistic modeling of single-cell
    multi-omic data with totalVI. Nature Methods 18 (2021).
    """

    slots: ClassVar = {
        "z": "obsm/X_totalVI",
        "library": "obs/totalvi_log_library",
        "protein": "obsm/totalvi_protein",
        "foreground_probability": "obsm/totalvi_foreground_probability",
        "rho": "layers/totalvi_normalized",
    }
    features: ClassVar = {"rho": "x", "protein": "y"}
    recoded: ClassVar = ("log_background",)
    owners: ClassVar = {"adversary": "batch_classifier"}
    plan = Plan(steps=1500, batch_size=256, lr=1e-2)

    def __init__(
        self,
        registry: Registry,
        n_hidden: int = 256,
        n_latent: int = 20,
        n_layers_encoder: int = 2,
        n_layers_decoder: int = 1,
        dropout_rate: float = 0.2,
        gene_likelihood: Literal["nb", "zinb"] = "nb",
        protein_dispersion: Literal["protein", "protein-batch", "protein-label"] = "protein",
        background_prior: Literal["empirical", "none"] | None = None,
        adversarial: bool | None = None,
        encode_covariates: bool = True,
        norm: Norm = "layer",
        reference_objective: bool = False,
        **options: Any,
    ) -> None:
        one_of("gene_likelihood", gene_likelihood, ("nb", "zinb"))
        one_of("protein_dispersion", protein_dispersion, ("protein", "protein-batch", "protein-label"))
        if background_prior is not None:
            one_of("background_prior", background_prior, ("empirical", "none"))
        if protein_dispersion == "protein-label" and not registry.given("labels"):
            raise ValueError("protein_dispersion='protein-label' needs labels: labels_key=")
        if "n_layers" in options:
            raise TypeError("TOTALVI has n_layers_encoder= and n_layers_decoder= in place of n_layers=")
        self.n_proteins, self.n_layers_decoder = registry.n_vars("y"), n_layers_decoder
        super().__init__(
            registry,
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers=n_layers_encoder,
            dropout_rate=dropout_rate,
            gene_likelihood=gene_likelihood,
            encode_covariates=encode_covariates,
            norm=norm,
            **options,
        )
        self.protein_dispersion, self.background_prior = protein_dispersion, background_prior
        self.adversarial, self.reference = adversarial, reference_objective
        if reference_objective:
            site = "z_raw" if self.logistic_normal else "z"
            self.annealed = (site, "log_background", "y", "efficiency", "mixing")
        hierarchical = isinstance(self.embedding, RandomEffects)
        n_batch, p = registry.n_categories("batch"), self.n_proteins

        def per_batch(start: float) -> CategoryTable:
            return CategoryTable("batch", n_batch, (p,), None, lambda t: t.fill_(start), open=hierarchical)

        self.prior_loc, self.prior_log_scale, self.log_efficiency = (
            per_batch(3.0),
            per_batch(0.0),
            per_batch(0.0),
        )
        if protein_dispersion == "protein":
            self.log_phi: nn.Module = GeneParameter(p)
        elif protein_dispersion == "protein-batch":
            self.log_phi = per_batch(0.0)
        else:
            self.log_phi = CategoryTable("labels", registry.n_categories("labels") + 1, (p,))
        self.batch_classifier = CategoryClassifier("batch", n_batch, n_latent)
        # 1 for each protein that was measured in some cell of the batch
        self.panel = per_batch(1.0)
        self.panel.requires_grad_(False)

    def _n_inputs(self) -> int:
        return self.registry.n_vars("x") + self.n_proteins

    def _build_decoder(self, n_latent: int, n_hidden: int, n_layers: int, inject: bool, norm: Norm) -> int:
        def trunk() -> Trunk:
            return Trunk(n_latent, n_hidden, self.n_layers_decoder, self.spec, inject, norm)

        n_genes, p, width = self.registry.n_vars("x"), self.n_proteins, n_hidden + n_latent
        self.decoder, self.background, self.foreground, self.mixing = trunk(), trunk(), trunk(), trunk()  # type: ignore[assignment]
        self.scale_head = Head(width, n_genes, self.spec)
        self.zi_head = Head(width, n_genes, self.spec) if self.gene_likelihood == "zinb" else None
        self.background_loc, self.background_scale = Head(width, p, self.spec), Head(width, p, self.spec)
        self.foreground_head, self.mixing_head = Head(width, p, self.spec), Head(width, p, self.spec)
        return width

    # -- the math -------------------------------------------------------------------------------------

    def model(  # type: ignore[override]
        self,
        x: Counts,
        y: Protein,
        measured: ProteinMask,
        batch: Batch,
        labels: Labels,
        size_factor: SizeFactor,
        categorical_covariates: CategoricalCovariates,
        continuous_covariates: ContinuousCovariates,
    ) -> None:
        """p(x, y, z, l, b, e): x (n, g), y and measured (n, p); codes (n,), covariates (n, k) and (n, p)."""
        rows = self._batch_rows(RandomEffects.prior)
        covariates = self._covariates(batch, categorical_covariates, continuous_covariates, rows)
        log_e = self._efficiency(batch, lambda at: dist.Normal(torch.zeros_like(at), 1.0).to_event(1))
        with self.cells(x):
            z = self._counts(x, batch, labels, size_factor, covariates, None)
            prior = dist.Normal(self.prior_loc(batch), self.prior_log_scale(batch).exp())
            log_b = pyro.sample("log_background", prior.mask(measured).to_event(1))
            log_rise = (
                F.relu(self.foreground_head(self.foreground(z, covariates), covariates)) + _TINY
            ).log1p()
            logits = self.mixing_head(self.mixing(z, covariates), covariates)
            pyro.deterministic("foreground_probability", (-logits).sigmoid(), event_dim=1)
            pyro.deterministic("foreground_mean", (log_b + log_rise).exp(), event_dim=1)
            pyro.deterministic("protein", (log_b + log_rise + F.logsigmoid(-logits)).exp(), event_dim=1)
            law = NegativeBinomialMixture(
                log_mean_background=log_e + log_b,
                log_mean_foreground=log_e + log_b + log_rise,
                log_inverse_dispersion=self._log_phi(batch, labels),
                mixing_logits=logits,
            )
            pyro.sample("y", law.mask(measured).to_event(1), obs=y)
            if self.reference:
                pyro.factor("mixing", 1e-3 * F.logsigmoid(logits).sum(-1))
                pyro.factor("efficiency", dist.LogNormal(0.0, 1.0).log_prob(log_e.exp()).sum(-1))

    def guide(  # type: ignore[override]
        self,
        x: Counts,
        y: Protein,
        measured: ProteinMask,
        batch: Batch,
        labels: Labels,
        size_factor: SizeFactor,
        categorical_covariates: CategoricalCovariates,
        continuous_covariates: ContinuousCovariates,
    ) -> None:
        """q(z | x, y), q(l | x, y) where the library is latent, q(log b | z), and the mode of e."""
        rows = self._batch_rows(RandomEffects.guide)
        covariates = self._covariates(batch, categorical_covariates, continuous_covariates, rows)
        self._efficiency(batch, lambda at: dist.Delta(at, event_dim=1))
        with self.cells(x):
            shown = self._shown(measured)
            z = self._code(self._features(x, y * shown, shown), covariates, labels)
            h = self.background(z, covariates)
            scale = F.softplus(self.background_scale(h, covariates)) + _TINY
            q = dist.Normal(self.background_loc(h, covariates), scale)
            pyro.sample("log_background", q.mask(measured).to_event(1))

    def _shown(self, measured: Tensor) -> Tensor:
        """Proteins that the encoder sees, (n, p).

        While training, those that were measured in another cell too, drawn at random from the minibatch: the
        encoder learns to do with any of the panels that there are, where it could else tell them apart. Any
        guide makes a bound; the likelihood is that of all proteins measured.
        """
        if not self.training or self.reference:
            return measured
        return measured & measured[torch.randperm(len(measured), device=measured.device)]

    def _features(self, x: Tensor, y: Tensor, measured: Tensor) -> Tensor:
        """What the encoder takes: log(1 + x / (1 + mean x)) of the genes, and the same of the proteins."""
        genes = self.measured("x")
        n_genes = x.shape[-1] if genes is None else int(genes.sum())
        n_proteins = y.shape[-1] if self.reference else measured.sum(-1, keepdim=True).clamp(min=1)
        x = x / (1 + x.sum(-1, keepdim=True) / n_genes)
        y = y / (1 + y.sum(-1, keepdim=True) / n_proteins)
        both = torch.cat([x, y], -1)
        return both.log1p() if self.log_input else both

    def _efficiency(self, batch: Tensor, law: Callable[[Tensor], Any]) -> Tensor:
        """log e of the batches, a global site but in the reference's objective; of each cell, (..., n, p)."""
        rows = self.log_efficiency.rows_by_code()
        if not self.reference:
            with pyro.plate("batches", len(rows), dim=-1):
                rows = pyro.sample("log_efficiency", law(rows))
        return of_cells(rows, batch)

    def _decode(self, z: Tensor, covariates: Covariates, shared: Tensor | None) -> Decoded:
        hidden = self.decoder(z, covariates)
        zi_logits = None
        if self.zi_head is not None:
            zi_logits = self.zi_head(self.mixing(z, covariates), covariates)
        return Decoded(self.scale_head(hidden, covariates), zi_logits, hidden)

    def _log_phi(self, batch: Tensor, labels: Tensor) -> Tensor:
        """Log inverse dispersion of the proteins, (p,) or (n, p)."""
        if self.protein_dispersion == "protein-batch":
            return self.log_phi(batch)
        if self.protein_dispersion == "protein-label":
            return self.log_phi(self._label_rows(labels))
        return self.log_phi()

    def auxiliary(
        self, batch: dict[str, Tensor], sites: dict[str, Tensor], step: int, kl_weight: float
    ) -> dict[str, Tensor]:
        """While the KL is annealed: the batch's classifier, and the encoder's reward for deceiving it."""
        weight, n = 1.0 - kl_weight, self.batch_classifier.n_categories
        if weight == 0 or n < 2 or self.surgery is not None:
            return {}
        stained = self.panel.all_rows()
        wanted = bool((stained != stained[0]).any()) if self.adversarial is None else self.adversarial
        if not wanted:
            return {}
        z, codes = sites["z"], batch["batch"]
        others = (1 - F.one_hot(codes, n).to(z)) / (n - 1)
        return {
            "adversary": weight * F.cross_entropy(self.batch_classifier(z.detach()), codes),
            "confusion": weight * F.cross_entropy(self.batch_classifier(z), others),
        }

    def columns(self, site: str) -> Sequence[str] | None:
        """The proteins, of what is per protein."""
        proteins = ("protein", "foreground_probability", "foreground_mean", "log_background")
        return self.registry.var_names("y") if site in proteins else None

    def annotated(self, site: str, values: np.ndarray, adata: Any, batch_size: int) -> np.ndarray:
        """Proteins that a batch was not stained for are imputed, as by `get_normalized_protein`."""
        if panels(self).all():
            return values
        if site == "protein":
            return np.asarray(normalized_protein(self, adata, batch_size=batch_size, as_numpy=True))
        if site == "foreground_probability":
            return foreground_probability(self, adata, batch_size=batch_size).to_numpy()
        return values

    # -- results --------------------------------------------------------------------------------------

    def get_normalized_protein(
        self, adata: AnnData | None = None, indices: Indices = None, **options: Any
    ) -> pd.DataFrame | np.ndarray:
        """Proteins without noise and background; options as of `pyrosc.normalized_protein`."""
        return normalized_protein(self, adata, indices, **options)

    def get_protein_foreground_probability(
        self, adata: AnnData | None = None, indices: Indices = None, **options: Any
    ) -> pd.DataFrame:
        """Probability of foreground; options as of `pyrosc.foreground_probability`."""
        return foreground_probability(self, adata, indices, **options)

    def get_feature_correlation_matrix(
        self, adata: AnnData | None = None, indices: Indices = None, **options: Any
    ) -> pd.DataFrame:
        """Correlations of genes and proteins; options as of `pyrosc.feature_correlation`."""
        return feature_correlation(self, adata, indices, **options)

    # -- starting values ------------------------------------------------------------------------------

    def initialize(self, data: Dataset | dict[str, Dataset]) -> None:
        """Genes as in `SCVI`; proteins: prior of the background by batch, and means of both components."""
        super().initialize(data)
        assert isinstance(data, Dataset)
        y, measured = data.codes("y"), data.codes("measured")
        self._of_batches(data, 0)
        low, rise = starting_means(y, measured)
        with torch.no_grad():
            self.background_loc.bias.copy_(torch.from_numpy(low))
            self.background_scale.bias.fill_(-1.0)
            self.foreground_head.bias.copy_(torch.from_numpy(rise))

    def initialize_query(self, data: Dataset) -> None:
        """Priors of library and background of the new batches."""
        super().initialize_query(data)
        self._of_batches(data, len(self.prior_loc.rows))

    def _of_batches(self, data: Dataset, first: int) -> None:
        """Panel, and prior of the background, of the batches from `first` on."""
        empirical = self.background_prior == "empirical" or (
            self.background_prior is None and self.n_proteins > 10
        )
        codes, y, measured = data.codes("batch"), data.codes("y"), data.codes("measured")
        with torch.no_grad():
            for s in range(first, self.panel.n_categories):
                here = codes == s
                self.panel.row(s).copy_(torch.from_numpy(measured[here].any(0)))
                found = background_prior(y[here], measured[here]) if empirical else None
                if found is not None:
                    self.prior_loc.row(s).fill_(found[0])
                    self.prior_log_scale.row(s).fill_(found[1])


class Trunk(nn.Module):
    """Hidden layers of a decoder, with the latent space beside them: (..., k) to (..., n_hidden + k)."""

    def __init__(
        self, n_latent: int, n_hidden: int, n_layers: int, spec: CovariateSpec, inject: bool, norm: Norm
    ) -> None:
        super().__init__()
        self.network = MLP(n_latent, n_hidden, n_layers, spec, inject, norm)

    def forward(self, z: Tensor, covariates: Covariates) -> Tensor:
        """Hidden units, and z."""
        return torch.cat([self.network(z, covariates), z], -1)


class Head(nn.Linear):
    """Linear map plus the covariates' rows: (..., n_in) to (..., n_out)."""

    def __init__(self, n_in: int, n_out: int, spec: CovariateSpec) -> None:
        super().__init__(n_in, n_out)
        self.effects = CovariateEffects(spec, n_out, n_in)

    def forward(self, h: Tensor, covariates: Covariates) -> Tensor:  # type: ignore[override]
        """(..., n_out)."""
        return super().forward(h) + self.effects(covariates)
