"""scVI: a variational autoencoder of single-cell counts (Lopez et al., Nature Methods 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
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
    Field,
    Labels,
    Registry,
    SizeFactor,
)
from pyrosc.data.errors import one_of
from pyrosc.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyrosc.infer.elbo import PathwiseELBO
from pyrosc.models.base import Model
from pyrosc.nn import MLP, CategoryTable, Covariates, CovariateSpec, NormalEncoder, RandomEffects
from pyrosc.nn.covariates import of_cells
from pyrosc.nn.layers import Norm


class Decoded(NamedTuple):
    """What a decoder gives: logits of expression and of zero inflation, (n, g), and its last hidden layer."""

    logits: Tensor
    zi_logits: Tensor | None
    hidden: Tensor


class SCVI(Model):
    """Single-cell variational inference.

    z ~ Normal(0, I); ρ = softmax f(z, batch, covariates); x ~ ZINB(l ρ, θ, π), l the library size.
    The guide is q(z | log1p x), a Normal with diagonal covariance computed by a network.

    Parameters
    ----------
    registry
        Made by `from_anndata`.
    n_hidden, n_latent, n_layers
        Width of the hidden layers, of the latent space, and depth of encoder and decoder.
    dropout_rate
        Of the encoder's hidden units, while training.
    dispersion
        Inverse dispersion θ per ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``.
    gene_likelihood
        ``"zinb"``, ``"nb"``, ``"poisson"`` or ``"normal"`` (mean l ρ, a standard deviation per gene).
    latent_distribution
        ``"normal"``, or ``"ln"`` for a logistic-normal latent: softmax of the Normal, on the simplex.
    use_observed_lib_size
        Take a cell's total count for its library size; False makes its logarithm latent, with a Normal
        prior per batch of the batch's observed mean and variance.
    encode_covariates
        Let the encoder see batch and covariates.
    deeply_inject_covariates
        Add them to each hidden layer; False to the first only.
    batch_representation
        ``"one-hot"``: a row per batch in each layer; ``"embedding"``: `batch_embedding_dim` learned numbers
        per batch, for many batches.
    batch_embedding_dim
        Width of the embedding.
    batch_prior
        ``"none"``: the batches' rows are free parameters; ``"hierarchical"``: the numbers of a batch (of an
        embedding) are latent, drawn from a Normal that is learned from all batches. A batch not seen is then
        predicted from that Normal: other data may have batches that were not registered, and
        ``do={"batch": None}`` decodes cells as if of such a batch.
    norm
        Normalisation of hidden layers: ``"layer"``, ``"batch"`` or ``"none"``.
    log_variational
        Whether the encoder takes log1p of the data; None for all but the ``"normal"`` likelihood.

    References
    ----------
    Lopez, Regier, Cole, Jordan, Yosef. Deep generative modeling for single-cell transcriptomics. Nature
    Methods 15 (2018).
    """

    elbo = PathwiseELBO(analytic_kl=True)
    vectorized = True
    slots: ClassVar = {"z": "obsm/X_scVI", "library": "obs/scvi_log_library", "rho": "layers/scvi_normalized"}

    def __init__(
        self,
        registry: Registry,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene",
        gene_likelihood: Literal["zinb", "nb", "poisson", "normal"] = "zinb",
        latent_distribution: Literal["normal", "ln"] = "normal",
        use_observed_lib_size: bool = True,
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        batch_representation: Literal["one-hot", "embedding"] = "one-hot",
        batch_embedding_dim: int = 5,
        batch_prior: Literal["none", "hierarchical"] = "none",
        norm: Norm = "layer",
        log_variational: bool | None = None,
    ) -> None:
        super().__init__(registry)
        one_of("dispersion", dispersion, ("gene", "gene-batch", "gene-label", "gene-cell"))
        one_of("gene_likelihood", gene_likelihood, ("zinb", "nb", "poisson", "normal"))
        one_of("latent_distribution", latent_distribution, ("normal", "ln"))
        one_of("batch_representation", batch_representation, ("one-hot", "embedding"))
        one_of("batch_prior", batch_prior, ("none", "hierarchical"))
        hierarchical = batch_prior == "hierarchical"
        if hierarchical and registry.n_categories("batch") < 2:
            raise ValueError("batch_prior='hierarchical' learns from several batches; name them: batch_key=")
        if dispersion == "gene-label" and not registry.given("labels"):
            raise ValueError("dispersion='gene-label' needs labels: labels_key=")
        n_genes = registry.n_vars()
        n_batch = registry.n_categories("batch")
        self.n_latent = n_latent
        self.dispersion, self.gene_likelihood = dispersion, gene_likelihood
        self.logistic_normal = latent_distribution == "ln"
        self.observed_library = use_observed_lib_size or registry.given("size_factor")
        self.encode_covariates = encode_covariates
        self.log_input = gene_likelihood != "normal" if log_variational is None else log_variational
        embedded = hierarchical or batch_representation == "embedding"
        self.embedding: CategoryTable | RandomEffects | None = None
        if hierarchical:
            self.embedding = RandomEffects("batch_effect", "batch", n_batch, batch_embedding_dim)
        elif embedded:
            self.embedding = CategoryTable("batch", n_batch, (batch_embedding_dim,), init=nn.init.normal_)
        self.spec = CovariateSpec.from_registry(
            registry,
            *([] if embedded else ["batch"]),
            "categorical_covariates",
            "continuous_covariates",
            extra_continuous=batch_embedding_dim if embedded else 0,
        )
        seen = self.spec if encode_covariates else CovariateSpec((), 0)
        inject = deeply_inject_covariates
        width = self._n_inputs()
        self.encoder = NormalEncoder(width, n_latent, n_hidden, n_layers, seen, inject, norm, dropout_rate)
        width = self._build_decoder(n_latent, n_hidden, n_layers, inject, norm)
        if dispersion == "gene-cell":
            self.log_theta: nn.Module = nn.Linear(width, n_genes)
        elif dispersion == "gene-label":
            self.log_theta = CategoryTable("labels", registry.n_categories("labels") + 1, (n_genes,))
        elif dispersion == "gene-batch":
            self.log_theta = CategoryTable("batch", n_batch, (n_genes,), open=hierarchical)
        else:
            self.log_theta = GeneParameter(n_genes)
        if not self.observed_library:
            size = (self._n_inputs(), 1, n_hidden, 1, seen, inject, norm, dropout_rate)
            self.library_encoder = NormalEncoder(*size)
            # mean and variance of the log library of each batch, from its cells
            self.library_prior = CategoryTable("batch", n_batch, (2,), None, nn.init.ones_, open=hierarchical)
            self.library_prior.requires_grad_(False)

    def _n_inputs(self) -> int:
        """Number of inputs of the encoder."""
        return self.registry.n_vars()

    def _build_decoder(self, n_latent: int, n_hidden: int, n_layers: int, inject: bool, norm: Norm) -> int:
        """Networks of `_decode`; returns the width of `Decoded.hidden`."""
        n_genes = self.registry.n_vars()
        self.decoder = MLP(n_latent, n_hidden, n_layers, self.spec, inject, norm)
        self.scale_head = nn.Linear(n_hidden, n_genes)
        self.zi_head = nn.Linear(n_hidden, n_genes) if self.gene_likelihood == "zinb" else None
        return n_hidden

    # -- the math -------------------------------------------------------------------------------------
    # A variant of scVI overrides the piece that differs: the global sites, the latent space, the decoder.

    def model(
        self,
        x: Counts,
        batch: Batch,
        labels: Labels,
        size_factor: SizeFactor,
        categorical_covariates: CategoricalCovariates,
        continuous_covariates: ContinuousCovariates,
    ) -> None:
        """p(x, z, l): x (n, g); codes (n,), covariates (n, k) and (n, p)."""
        rows = self._batch_rows(RandomEffects.prior)
        covariates = self._covariates(batch, categorical_covariates, continuous_covariates, rows)
        shared = self._global_prior()
        with self.cells(x):
            self._counts(x, batch, labels, size_factor, covariates, shared)

    def guide(
        self,
        x: Counts,
        batch: Batch,
        labels: Labels,
        size_factor: SizeFactor,
        categorical_covariates: CategoricalCovariates,
        continuous_covariates: ContinuousCovariates,
    ) -> None:
        """q(z | x) and, where the library is latent, q(l | x)."""
        rows = self._batch_rows(RandomEffects.guide)
        covariates = self._covariates(batch, categorical_covariates, continuous_covariates, rows)
        self._global_guide()
        with self.cells(x):
            self._code(x.log1p() if self.log_input else x, covariates, labels)

    def _counts(
        self,
        x: Tensor,
        batch: Tensor,
        labels: Tensor,
        size_factor: Tensor,
        covariates: Covariates,
        shared: Tensor | None,
    ) -> Tensor:
        """Latent space and counts of the cells; returns z, (n, k)."""
        z = self._latent_prior(x, labels)
        library = self._library(x, batch, size_factor)
        decoded = self._decode(z, covariates, shared)
        log_rho = self._log_rho(decoded.logits)
        pyro.deterministic("rho", log_rho.exp(), event_dim=1)
        log_theta = self._log_theta(decoded.hidden, batch, labels)
        zi_logits = self._zi_logits(decoded.zi_logits, shared, batch, labels)
        law = self._law(self._of_measured(log_rho) + library.unsqueeze(-1), log_theta, zi_logits)
        pyro.sample("x", law.to_event(1), obs=x)
        return z

    def _code(self, features: Tensor, covariates: Covariates, labels: Tensor) -> Tensor:
        """Guide of the latent space, and of a latent library, from encoder inputs; returns z, (n, k)."""
        seen = covariates if self.encode_covariates else None
        z = self._latent_guide(features, seen, labels)
        if not self.observed_library:
            loc, scale = self.library_encoder(features, seen)
            loc = loc + self.log_share_measured("x")
            pyro.sample("library", dist.Normal(loc.squeeze(-1), scale.squeeze(-1)))
        return z

    def _global_prior(self) -> Tensor | None:
        """Latent sites outside of the plate over cells, for variants that have some."""
        return None

    def _global_guide(self) -> None:
        """Their guide."""

    def _latent_prior(self, x: Tensor, labels: Tensor) -> Tensor:
        """z of each cell, (n, k)."""
        prior = dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1)
        if self.logistic_normal:
            return pyro.deterministic("z", pyro.sample("z_raw", prior).softmax(-1), event_dim=1)
        return pyro.sample("z", prior)

    def _latent_guide(self, features: Tensor, covariates: Covariates | None, labels: Tensor) -> Tensor:
        q = dist.Normal(*self.encoder(features, covariates)).to_event(1)
        return pyro.sample("z_raw", q).softmax(-1) if self.logistic_normal else pyro.sample("z", q)

    def _library(self, x: Tensor, batch: Tensor, size_factor: Tensor) -> Tensor:
        """Log library size of each cell, (n,)."""
        if not self.observed_library:
            loc, variance = self.library_prior(batch).unbind(-1)
            return pyro.sample("library", dist.Normal(loc, variance.sqrt()))
        total = size_factor if self.registry.given("size_factor") else x.sum(-1)
        return pyro.deterministic("library", total.log(), event_dim=0)

    def _decode(self, z: Tensor, covariates: Covariates, shared: Tensor | None) -> Decoded:
        """From the latent space to the genes; `shared` are the global sites' values."""
        hidden = self.decoder(z, covariates)
        zi_logits = None if self.zi_head is None else self.zi_head(hidden)
        return Decoded(self.scale_head(hidden), zi_logits, hidden)

    def _log_rho(self, logits: Tensor) -> Tensor:
        """Log of expression: a share of the cell's transcripts or, with a size factor, any positive rate."""
        return F.softplus(logits).log() if self.registry.given("size_factor") else logits.log_softmax(-1)

    def _of_measured(self, log_rho: Tensor) -> Tensor:
        """Log shares of the genes that the cells were measured for: library sizes count those alone."""
        measured = self.measured("x")
        if measured is None or self.registry.given("size_factor"):
            return log_rho
        return log_rho - log_rho.masked_fill(~measured, -torch.inf).logsumexp(-1, keepdim=True)

    def _log_theta(self, hidden: Tensor, batch: Tensor, labels: Tensor) -> Tensor:
        if self.dispersion == "gene-cell":
            return self.log_theta(hidden)
        if self.dispersion == "gene-batch":
            return self.log_theta(batch)
        if self.dispersion == "gene-label":
            return self.log_theta(self._label_rows(labels))
        return self.log_theta()

    def _label_rows(self, labels: Tensor) -> Tensor:
        """Rows in a table per label: unlabelled cells share the last one."""
        return torch.where(labels < 0, self.registry.n_categories("labels"), labels)

    def _zi_logits(
        self, decoded: Tensor | None, shared: Tensor | None, batch: Tensor, labels: Tensor
    ) -> Tensor | None:
        """Logits of zero inflation, (n, g), or None for laws without."""
        return decoded

    def _law(self, log_mean: Tensor, log_theta: Tensor, zi_logits: Tensor | None) -> Any:
        if zi_logits is not None:
            return ZeroInflatedNegativeBinomial(
                log_mean=log_mean, log_inverse_dispersion=log_theta, zi_logits=zi_logits
            )
        if self.gene_likelihood == "nb":
            return NegativeBinomial(log_mean=log_mean, log_inverse_dispersion=log_theta)
        if self.gene_likelihood == "poisson":
            return Poisson(log_mean=log_mean)
        return dist.Normal(log_mean.exp(), log_theta.exp())

    def _batch_rows(self, of: Callable[[RandomEffects], Tensor]) -> Tensor | None:
        """The batches' rows of an embedding, by sampling (in the model, the guide) where they are latent."""
        if self.embedding is None:
            return None
        if isinstance(self.embedding, RandomEffects):
            return of(self.embedding)
        return self.embedding.all_rows()

    def _covariates(
        self, batch: Tensor, categorical: Tensor, continuous: Tensor, rows: Tensor | None
    ) -> Covariates:
        tensors = {"batch": batch, "categorical_covariates": categorical, "continuous_covariates": continuous}
        if rows is None:
            return self.spec.pack(tensors)
        return self.spec.pack(tensors, of_cells(rows, batch))

    @classmethod
    def fields(cls, **options: Any) -> dict[str, Field]:
        """As of any model; the batch is open to unseen ones where it has a prior."""
        found = super().fields(**options)
        if options.get("batch_prior") == "hierarchical":
            found["batch"] = found["batch"](open=True)
        return found

    # -- starting values ------------------------------------------------------------------------------

    def initialize(self, data: Dataset | dict[str, Dataset]) -> None:
        """Decoder biases at the log of mean shares; priors of the library per batch from its cells."""
        assert isinstance(data, Dataset)
        summary = data.summary("x")
        shares = np.maximum(summary.gene_sums, 0.5)  # half a count for genes without any
        with torch.no_grad():
            if not self.registry.given("size_factor") and self.gene_likelihood != "normal":
                self.scale_head.bias.copy_(torch.as_tensor(np.log(shares / shares.sum())))
            if not self.observed_library:
                totals = np.log(summary.cell_sums)
                self._library_priors(data, 0)
                self.library_encoder.loc.bias.fill_(float(totals.mean()))
                self.library_encoder.log_variance.bias.fill_(float(np.log(max(totals.var(), 1e-4))))

    def initialize_query(self, data: Dataset) -> None:
        """Priors of the library per new batch."""
        if not self.observed_library:
            self._library_priors(data, len(self.library_prior.rows))

    def _library_priors(self, data: Dataset, first: int) -> None:
        """Mean and variance of the log library of the batches from `first` on, from their cells."""
        codes, totals = data.codes("batch"), np.log(data.summary("x").cell_sums)
        with torch.no_grad():
            for i in range(first, self.library_prior.n_categories):
                here = totals[codes == i]
                self.library_prior.row(i).copy_(torch.tensor([here.mean(), max(here.var(), 1e-4)]))

    def support(self) -> dict[str, str]:
        """The Normal likelihood takes any real numbers."""
        return {"x": "real"} if self.gene_likelihood == "normal" else {}


class GeneParameter(nn.Module):
    """One free number per gene, (g,), starting at zero."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(n_genes))

    def forward(self) -> Tensor:
        """(g,)."""
        return self.values
