"""CellAssign: cell types by a list of marker genes (Zhang et al., Nature Methods 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn
from torch.distributions import StickBreakingTransform

from pyrosc.data import (
    Batch,
    CategoricalCovariates,
    ContinuousCovariates,
    Counts,
    DataError,
    Dataset,
    Field,
    Registry,
    SizeFactor,
    Total,
)
from pyrosc.data import encode as enc
from pyrosc.data.errors import listed, one_of, warn
from pyrosc.data.inputs import dummy_batch
from pyrosc.data.markers import Markers, match_markers, read_markers
from pyrosc.distributions.truncation import truncate_below
from pyrosc.infer.guides import Amortized
from pyrosc.infer.posterior import collect, stream
from pyrosc.models.base import Model
from pyrosc.models.marker_counts import GeneDispersion, MarkerCounts, MeanDispersion, Pairs
from pyrosc.nn import CovariateEffects, CovariateSpec
from pyrosc.train.plan import Plan

if TYPE_CHECKING:
    from anndata import AnnData


class CellAssign(Model):
    """Cell types of single cells by marker genes, without labels.

    type ~ Categorical(π); x ~ NB(μ, φ(μ)) with log μ = log s + β + δ for the markers of the cell's type, and
    log s + β for all other genes: s the size factor, β a gene's level with effects of batch and covariates,
    δ > `min_effect` how much a type raises its markers. The type is summed out, so that training climbs the
    marginal likelihood of the counts (expectation maximisation by gradients); all else is a MAP estimate.

    Parameters
    ----------
    registry
        Made by `from_anndata`.
    markers
        Marker genes by type: a dict, a DataFrame of genes × types with 0 and 1, or the path of such a table
        as CSV. Markers that the data lack are left out with a warning. A type without any is as `other`.
    other
        Name of a further class without markers, for cells of none of the types; None for no such class.
    dispersion
        Inverse dispersion φ as a function of the mean, the same for all genes (``"mean"``), or a number per
        gene (``"gene"``).
    min_effect
        Least δ, natural logarithm of a fold change.
    concentration
        α of π ~ Dirichlet(α).
    min_inverse_dispersion
        Least φ.

    References
    ----------
    Zhang, O'Flanagan, Chavez, … Shah. Probabilistic cell-type assignment of single-cell RNA-seq for tumor
    microenvironment profiling. Nature Methods 16 (2019).
    """

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    plan = Plan(steps=600, min_epochs=2, max_epochs=600, batch_size=256, lr=5e-2, warmup=0.0)
    label = "type"
    slots: ClassVar = {"type": "obs/cellassign_type"}

    log_mean_total: Tensor
    first_effects: Tensor

    def __init__(
        self,
        registry: Registry,
        markers: Mapping[str, Sequence[str]],
        other: str | None = None,
        dispersion: Literal["mean", "gene"] = "mean",
        min_effect: float = 2.0,
        concentration: float = 0.01,
        min_inverse_dispersion: float = 0.01,
    ) -> None:
        super().__init__(registry)
        one_of("dispersion", dispersion, ("mean", "gene"))
        for name, value in {
            "min_effect": min_effect,
            "concentration": concentration,
            "min_inverse_dispersion": min_inverse_dispersion,
        }.items():
            if not value > 0:
                raise ValueError(f"{name} is positive; got {value}")
        by_type = {kind: list(genes) for kind, genes in markers.items()}
        if other is not None:
            if other in by_type:
                raise ValueError(
                    f"other='{other}' is the name of a type in markers; give it a name of its own"
                )
            by_type[other] = []
        _check_types(by_type)
        genes = registry.var_names()
        position = {g: i for i, g in enumerate(genes)}
        pairs = [(position[g], c) for c, names in enumerate(by_type.values()) for g in names]
        self.types = tuple(by_type)
        self.min_effect, self.concentration = min_effect, concentration
        self.pairs = Pairs([g for g, _ in pairs], [c for _, c in pairs], len(genes), len(by_type))
        self.spec = CovariateSpec.from_registry(
            registry, "batch", "categorical_covariates", "continuous_covariates"
        )
        self.level = nn.Parameter(torch.zeros(len(genes)))
        self.effects = CovariateEffects(self.spec, len(genes), fan_in=1)
        with torch.no_grad():
            for parameter in self.effects.parameters():
                parameter.zero_()
        if dispersion == "mean":
            self.log_phi: nn.Module = MeanDispersion(min_inverse_dispersion)
        else:
            self.log_phi = GeneDispersion(len(genes), min_inverse_dispersion)
        self.register_buffer("log_mean_total", torch.zeros(()))
        # restarts begin at different δ: a fifth of a standard deviation of the prior about its median
        self.register_buffer("first_effects", 0.2 * torch.randn(len(pairs)), persistent=False)

    # -- the math -------------------------------------------------------------------------------------

    def model(
        self,
        x: Counts,
        batch: Batch,
        categorical_covariates: CategoricalCovariates,
        continuous_covariates: ContinuousCovariates,
        total: Total = None,  # type: ignore[assignment]
        size_factor: SizeFactor = None,  # type: ignore[assignment]
    ) -> None:
        """p(x, type, δ, π): x (n, g); codes (n,), covariates (n, k) and (n, p), size of the cell (n,).

        All global sites are real numbers, or positive, with bounded densities, so that their mode exists.
        """
        loc = pyro.sample("effect_loc", dist.Normal(x.new_zeros(()), 1.0))
        scale = pyro.sample("effect_scale", dist.HalfNormal(x.new_ones(())))
        standard = pyro.sample("effect", dist.Normal(x.new_zeros(len(self.pairs)), 1.0).to_event(1))
        log_delta = truncate_below(standard, loc, scale, math.log(self.min_effect))
        delta = pyro.deterministic("delta", log_delta.exp(), event_dim=1)
        simplex = StickBreakingTransform()
        prior = dist.Dirichlet(x.new_full((len(self.types),), self.concentration))
        odds = pyro.sample("log_odds", dist.TransformedDistribution(prior, [simplex.inv]))
        pi = pyro.deterministic("pi", simplex(odds), event_dim=1)
        covariates = self.spec.pack(
            {
                "batch": batch,
                "categorical_covariates": categorical_covariates,
                "continuous_covariates": continuous_covariates,
            }
        )
        log_mean = self.level + self.effects(covariates) + self._log_size(total, size_factor).unsqueeze(-1)
        with self.cells(x):
            kind = pyro.sample("type", dist.Categorical(pi), infer={"enumerate": "parallel"})
            pyro.sample("x", MarkerCounts(log_mean, delta, self.pairs, self.log_phi, kind), obs=x)

    def _log_size(self, total: Tensor | None, size_factor: Tensor | None) -> Tensor:
        if size_factor is not None:
            return size_factor.log()
        assert total is not None
        return total.log() - self.log_mean_total

    def setup(self) -> Self:
        """The guide is a point estimate of the global sites; the type of a cell is summed out."""
        if not hasattr(self, "auto_guide"):
            self.auto_guide = Amortized(self, global_guide="delta")
        return super().setup()

    def starting_values(self) -> dict[str, Tensor]:
        """δ about the median of its prior, all types equally frequent."""
        like = self.first_effects
        return {
            "effect_loc": like.new_zeros(()),
            "effect_scale": like.new_ones(()),
            "effect": like,
            "log_odds": like.new_zeros(len(self.types) - 1),
        }

    # -- data -----------------------------------------------------------------------------------------

    @classmethod
    def fields(cls, **options: Any) -> dict[str, Field]:
        """Size factors come from totals, or from a column."""
        unused = "total" if options.get("size_factor_key") is not None else "size_factor"
        return {name: field for name, field in super().fields().items() if name != unused}

    @classmethod
    def from_anndata(  # type: ignore[override]
        cls, adata: AnnData, markers: Markers, *, other: str | None = None, **options: Any
    ) -> Self:
        """A model for an AnnData or MuData, not trained yet.

        Parameters
        ----------
        adata
            Cells with *all* their genes, since the size factor of a cell is its total count over them,
            divided by the mean of these totals; never changed. Or with the markers alone, and
            ``size_factor_key``.
        markers, other
            See `CellAssign`.
        **options
            Where the fields are (``layer=``, ``batch_key=``, ``size_factor_key=``,
            ``categorical_covariate_keys=``, ``continuous_covariate_keys=``), ``standardize=``,
            ``modalities=``, ``seed=``, and the options of the model.

        Raises
        ------
        DataError
            If a type keeps no marker, two types have the same ones, or the data do not fit.
        """
        if "genes" in options:
            raise TypeError("CellAssign reads the marker genes; leave out genes=")
        if options.get("size_factor_key") is None:
            options.pop("size_factor_key", None)
        var_names = enc.part(adata, (options.get("modalities") or {}).get("x")).var_names
        by_type = match_markers(read_markers(markers), var_names, cls.__name__)
        _check_types(by_type | ({other: []} if other is not None and other not in by_type else {}))
        wanted = {g for names in by_type.values() for g in names}
        genes = [g for g in dict.fromkeys(map(str, var_names)) if g in wanted]
        if len(genes) == len(var_names) and "size_factor_key" not in options:
            warn(
                f"adata has the {len(genes):,} marker genes and no others, so that size factors follow from "
                "their counts alone, and a cell with high markers looks large; pass all genes, or "
                "size_factor_key="
            )
        return super().from_anndata(adata, genes=genes, markers=by_type, other=other, **options)

    def initialize(self, data: Dataset | dict[str, Dataset]) -> None:
        """Levels under which the mean of each gene is that of the data; the range of φ's centres."""
        assert isinstance(data, Dataset)
        sums = data.summary("x").gene_sums
        if self.registry.fields.keys() & {"total"}:
            mean_total = float(data.codes("total").mean(dtype=np.float64))
            self.log_mean_total.fill_(math.log(mean_total))
            sizes = data.codes("total") / mean_total
        else:
            sizes = data.codes("size_factor")
        mean = np.maximum(sums, 0.5) / sizes.sum(dtype=np.float64)  # half a count for genes without any
        with torch.no_grad():
            start = self.starting_values()
            log_delta = truncate_below(
                start["effect"], start["effect_loc"], start["effect_scale"], math.log(self.min_effect)
            )
            raised = self.pairs.table(log_delta.exp()).exp().mean(0)  # types are equally frequent at first
            self.level.copy_(torch.as_tensor(mean).to(raised).log() - raised.log())
            if isinstance(self.log_phi, MeanDispersion):
                self.log_phi.largest.fill_(max(_largest(data), 1.0))

    def support(self) -> dict[str, str]:
        """A cell may lack counts of all markers."""
        return {"x": "panel"}

    # -- results --------------------------------------------------------------------------------------

    def label_names(self) -> Sequence[str]:
        """The types."""
        return self.types

    def get_marker_effects(
        self, *, n_samples: int = 0, quantile: float | None = None, seed: int = 0
    ) -> pd.DataFrame:
        """How much each type raises its markers: δ, the natural logarithm of the fold change.

        Parameters
        ----------
        n_samples
            Draws from the guide, for one that is more than a point; 0 for its centre.
        quantile
            Of the draws, in [0, 1]; None for their mean.
        seed
            Of the draws; no global generator is touched.

        Returns
        -------
        pandas.DataFrame
            Markers × types, NaN where a gene does not mark a type.
        """
        delta = self._global("delta", n_samples, quantile, seed)
        table = self.pairs.table(torch.as_tensor(delta, device=self.device), math.nan).T.cpu().numpy()
        return pd.DataFrame(table, index=list(self.registry.var_names()), columns=list(self.types))

    def get_type_frequencies(
        self, *, n_samples: int = 0, quantile: float | None = None, seed: int = 0
    ) -> pd.Series:
        """Share of each type among the cells, π; arguments as of `get_marker_effects`."""
        found = self._global("pi", n_samples, quantile, seed)
        return pd.Series(found, index=list(self.types), name="frequency")

    def _global(self, site: str, n_samples: int, quantile: float | None, seed: int) -> np.ndarray:
        """Posterior of a site that no cell is needed for."""
        if quantile is not None and not 0 <= quantile <= 1:
            raise ValueError(f"quantile is in [0, 1], not {quantile}")
        if quantile is not None and n_samples == 0:
            raise ValueError("a quantile is of draws; ask for some: n_samples=1000")
        made_up = iter([(np.arange(2), dummy_batch(self.registries, self.device))])
        reduce: Any = "mean" if quantile is None else [quantile]
        values = stream(self, [site], made_up, n_samples=n_samples, reduce=reduce, seed=seed)
        found = collect(values, 2, reduced=quantile is None)[site]
        return found if quantile is None else found[0]


def _check_types(by_type: Mapping[str, Sequence[str]]) -> None:
    if len(by_type) < 2:
        raise DataError(
            f"markers name one type, {listed(by_type)}, and nothing to tell it from; add types, or "
            "other='other'"
        )
    bare = [kind for kind, genes in by_type.items() if not genes]
    if len(bare) > 1:
        raise DataError(f"{listed(bare)} have no markers, so that nothing tells them apart; keep one of them")
    seen: dict[frozenset[str], str] = {}
    for kind, genes in by_type.items():
        before = seen.setdefault(frozenset(genes), kind)
        if before != kind:
            raise DataError(
                f"'{before}' and '{kind}' have the same markers in these data ({listed(genes)}), so that "
                "nothing tells them apart; merge them, or add markers"
            )


def _largest(data: Dataset) -> float:
    """The largest count of a marker."""
    return max((float(block.max()) for _, block in data.matrices["x"].chunks()), default=0.0)
