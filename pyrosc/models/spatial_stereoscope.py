"""Stereoscope's spots: cell types in them, from profiles of single cells (Andersson et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrosc.data import Counts, Field, Index, Registry
from pyrosc.data.errors import listed, one_of, warn
from pyrosc.data.genes import shared_genes
from pyrosc.data.inputs import as_rows
from pyrosc.data.schema import MAIN
from pyrosc.infer.elbo import PathwiseELBO
from pyrosc.models.base import Model
from pyrosc.models.results import Indices
from pyrosc.models.stereoscope import RNAStereoscope, law_of
from pyrosc.nn import MLP, CellTable
from pyrosc.train import Plan

if TYPE_CHECKING:
    from anndata import AnnData

#: Training defaults by mode. Rows of single spots move once per epoch, so there are at least 200 epochs.
_PLANS = {
    "map": Plan(steps=2000, min_epochs=200, max_epochs=400, lr=0.3, rise=0.1, warmup=0.0, train_size=1.0),
    "amortized": Plan(steps=2000, min_epochs=200, max_epochs=400, lr=0.03, warmup=0.0, train_size=1.0),
    "posterior": Plan(steps=2000, min_epochs=200, max_epochs=400, lr=0.1, warmup=0.0, train_size=1.0),
}
_SPREAD = -2.0  # standard deviation of log v at the start of the posterior mode, before softplus
_DRAWS = 4  # per step of the posterior mode: a spot's row moves once per epoch, by the noise of its draws
_TINY = 1e-12  # keeps a rate that underflows away from log 0
NOISE = "noise_term"


class SpatialStereoscope(Model):
    """The spatial half of Stereoscope: how much of each cell type is in each spot.

    x_sg ~ NB(total Σ_c softplus(β_g) softplus(W_cg) v_sc + softplus(η_g) v_s,noise, logits o_g), with W and o
    of a trained `RNAStereoscope`, η ~ Normal(0, 1), and v = u_s softplus(V_s), V free. The unit u_s follows
    from the spot's total count: it changes the scale on which V is learned, not the maximum.

    Made by `from_rna_model`.

    Parameters
    ----------
    registry, cell_types
        Given by `from_rna_model`.
    proportions
        ``"map"``: free V for each spot, as published. ``"amortized"``: V is computed from the spot's counts
        by a network, so that other spots can be asked about. ``"posterior"``: v_sc ~ Gamma(a, a / u_sc) with
        a posterior for each spot, which gives credible intervals.
    concentration
        Shape a of the Gamma prior of the ``"posterior"`` mode; default 1, for which all proportions are alike
        before the data are seen. Below 1 favours spots of few types.
    n_hidden, n_layers
        Of the network of the ``"amortized"`` mode; default 128 and 1.

    References
    ----------
    Andersson, Bergenstråhle, Asp, ... Lundeberg. Single-cell and spatial transcriptomics enables
    probabilistic inference of cell type topography. Communications Biology 3 (2020).
    """

    vectorized = True
    plan = _PLANS["map"]
    W: Tensor
    o: Tensor
    scale: Tensor
    slots: ClassVar = {
        "proportions": "obsm/stereoscope_proportions",
        "noise_share": "obs/stereoscope_noise_share",
    }

    def __init__(
        self,
        registry: Registry,
        cell_types: Sequence[str],
        proportions: Literal["map", "amortized", "posterior"] = "map",
        concentration: float | None = None,
        n_hidden: int | None = None,
        n_layers: int | None = None,
    ) -> None:
        super().__init__(registry)
        one_of("proportions", proportions, _PLANS)
        own = {"concentration": "posterior", "n_hidden": "amortized", "n_layers": "amortized"}
        for name, mode in own.items():
            if self.config[name] is not None and proportions != mode:
                raise ValueError(f"{name}= belongs to proportions='{mode}', not to {proportions!r}")
        if concentration is not None and not concentration > 0:
            raise ValueError(f"concentration is a positive number, not {concentration}")
        self.cell_types, self.mode = tuple(cell_types), proportions
        self.plan = _PLANS[proportions]
        self.concentration = 1.0 if concentration is None else float(concentration)
        n_genes, k = registry.n_vars(), len(self.cell_types) + 1
        self.register_buffer("W", torch.zeros(k - 1, n_genes))
        self.register_buffer("o", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(k))  # v that stands for one count of a spot
        self.beta = nn.Parameter(torch.zeros(n_genes))
        self.eta = nn.Parameter(torch.zeros(n_genes))
        if proportions == "amortized":
            self.encoder = MLP(n_genes, n_hidden or 128, n_layers or 1, norm="layer")
            self.head = nn.Linear(n_hidden or 128, k)
        else:
            self.V = CellTable(registry.n_obs, (k,))
        if proportions == "posterior":
            self.elbo = PathwiseELBO(num_particles=_DRAWS)
            self.L = CellTable(registry.n_obs, (k, k))

    # -- the math -------------------------------------------------------------------------------------

    def model(self, x: Counts, spot: Index = None) -> None:  # type: ignore[assignment]
        """p(x, η, v): x (n, g) counts, spot (n,) rows of the registered spots."""
        profiles = F.softplus(self.beta) * F.softplus(self.W)
        noise = F.softplus(pyro.sample("eta", dist.Normal(torch.zeros_like(self.eta), 1.0).to_event(1)))
        with self.cells(x):
            v = self._amounts(x, spot)
            types, rest = v[..., :-1], v[..., -1:]
            pyro.deterministic("proportions", types / types.sum(-1, keepdim=True), event_dim=1)
            pyro.deterministic("shares", v / v.sum(-1, keepdim=True), event_dim=1)
            unexplained = rest.squeeze(-1) * (noise @ self.o.exp())
            explained = (types * (profiles @ self.o.exp()).unsqueeze(-2)).sum(-1)
            pyro.deterministic("noise_share", unexplained / (unexplained + explained), event_dim=0)
            total = types @ profiles + rest * noise
            pyro.sample("x", law_of(total.clamp(min=_TINY).log(), self.o), obs=x)

    def guide(self, x: Counts, spot: Index = None) -> None:  # type: ignore[assignment]
        """A point estimate of η and, in the posterior mode, log v ~ Normal with a covariance per spot."""
        pyro.sample("eta", dist.Delta(self.eta).to_event(1))
        if self.mode != "posterior":
            return
        raw = self.L(spot)
        scale = F.softplus(raw.diagonal(dim1=-2, dim2=-1) + _SPREAD).unsqueeze(-1)
        factor = scale * (torch.eye(raw.shape[-1], device=raw.device) + raw.tril(-1))
        with self.cells(x):
            normal = dist.MultivariateNormal(self._unit(x).log() + self.V(spot), scale_tril=factor)
            pyro.sample("v", dist.TransformedDistribution(normal, [dist.transforms.ExpTransform()]))

    def _amounts(self, x: Tensor, spot: Tensor) -> Tensor:
        """Amount v of each type and of the noise in each spot, (n, c + 1)."""
        unit = self._unit(x)
        if self.mode == "posterior":
            prior = dist.Gamma(torch.full_like(unit, self.concentration), self.concentration / unit)
            return pyro.sample("v", prior.to_event(1))
        raw = self.head(self.encoder(x.log1p())) if self.mode == "amortized" else self.V(spot)
        return pyro.deterministic("v", unit * F.softplus(raw), event_dim=1)

    def _unit(self, x: Tensor) -> Tensor:
        """Amount of each type that alone would explain an equal share of a spot's counts, (n, c + 1)."""
        return x.sum(-1, keepdim=True) * self.scale

    # -- making one -----------------------------------------------------------------------------------

    @classmethod
    def fields(cls, **options: Any) -> dict[str, Field]:
        """Fields; the amortised mode knows no spot by its name."""
        found = super().fields()
        if options.get("proportions") == "amortized":
            del found["spot"]
        return found

    @classmethod
    def from_anndata(cls, *args: Any, **options: Any) -> Self:
        """Refused: profiles of cell types come from a reference, see `from_rna_model`."""
        raise TypeError(
            "SpatialStereoscope needs a single-cell reference: rna = RNAStereoscope.from_anndata(reference, "
            "labels_key=...).fit(), then SpatialStereoscope.from_rna_model(spots, rna)"
        )

    @classmethod
    def from_rna_model(
        cls,
        adata: AnnData,
        rna_model: RNAStereoscope,
        *,
        cell_types: Sequence[str] | None = None,
        ignore_case: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """A model of spots from a trained model of single cells.

        Genes are matched by name; those that one of the two lacks are left out.

        Parameters
        ----------
        adata
            Spots, with coordinates in ``obsm["spatial"]`` if they are to be drawn; never changed.
        rna_model
            The trained reference. Its parameters are copied.
        cell_types
            Types to use; default all of the reference.
        ignore_case
            Take genes whose names differ only in case for the same.
        seed
            Seed of the starting values.
        **options
            ``layer=`` of the counts, and the options of the model.

        Raises
        ------
        ValueError
            If the reference is not trained, or lacks a type that was asked for.
        DataError
            If too few genes are shared, or the data are not counts.

        Warns
        -----
        DataWarning
            Naming genes of the reference that the spots lack.
        """
        if not isinstance(rna_model, RNAStereoscope):
            raise TypeError(f"rna_model is a trained RNAStereoscope, not {type(rna_model).__name__}")
        if not rna_model.trained:
            raise ValueError("the reference is not trained yet: call rna_model.fit() first")
        known = list(rna_model.registry.categories("labels"))
        types = known if cell_types is None else list(cell_types)
        if strange := [c for c in types if c not in known]:
            raise ValueError(f"the reference has no type {listed(strange)}; it has {listed(known, 50)}")
        every = rna_model.registry.var_names()
        names = {"reference": list(every), "spots": list(map(str, adata.var_names))}
        shared = shared_genes(names, ignore_case=ignore_case, at_least=len(types) + 1)
        known_genes, genes = shared.values()
        there = set(known_genes)
        if missing := [g for g in every if g not in there]:
            warn(
                f"the spots lack {len(missing):,} of the {len(every):,} genes of the reference, which are "
                f"left out: {listed(missing)}"
            )
        self = super().from_anndata(adata, genes=genes, cell_types=types, seed=seed, **options)
        position = {g: i for i, g in enumerate(every)}
        columns = [position[g] for g in known_genes]
        with torch.no_grad():
            self.W.copy_(rna_model.W.all_rows()[[known.index(c) for c in types]][:, columns])
            self.o.copy_(rna_model.o[columns])
            counts = self.o.exp() * F.softplus(self.beta)  # of one v, at the start
            per_type = (F.softplus(self.W) @ counts).mean()
            per_noise = (self.o.exp() * F.softplus(self.eta)).sum()
            self.scale.copy_(
                torch.stack([*[per_type] * len(types), per_noise]).reciprocal() / len(self.scale)
            )
        return self

    @classmethod
    def example(
        cls, adatas: Mapping[str, AnnData], keys: Mapping[str, Mapping[str, Any]], seed: int, **options: Any
    ) -> Self:
        """A model of made-up spots, by way of a made-up reference."""
        from pyrosc.simulate import design_for

        reference, where = design_for(RNAStereoscope.fields(), seed=1)
        rna = RNAStereoscope.from_anndata(reference, **where)
        rna.fit(2, progress=False, device="cpu")
        return cls.from_rna_model(adatas[MAIN], rna, seed=seed, **keys[MAIN], **options)

    # -- results --------------------------------------------------------------------------------------

    def columns(self, site: str) -> Sequence[str] | None:
        """Cell types of proportions, and the noise of shares and amounts."""
        if site == "proportions":
            return self.cell_types
        return (*self.cell_types, NOISE) if site in ("shares", "v") else None

    def get_proportions(
        self,
        adata: AnnData | None = None,
        indices: Indices = None,
        *,
        keep_noise: bool = False,
        quantiles: Sequence[float] | None = None,
        n_samples: int | None = None,
        batch_size: int = 512,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Proportion of each cell type in each spot: v divided by its sum.

        Parameters
        ----------
        adata
            Spots; default the registered ones. Spots that the model was not made with can be asked about in
            the ``"amortized"`` mode only.
        indices
            Positions or a boolean mask.
        keep_noise
            Keep the noise as a last column ``"noise_term"`` and in the sum. Its unit is not that of the types
            (site ``noise_share`` has its share in the expected counts).
        quantiles
            Numbers in [0, 1], of the ``"posterior"`` mode: ``(0.05, 0.95)`` gives the ends of 90 % credible
            intervals, as columns (type, quantile).
        n_samples
            Draws of the ``"posterior"`` mode; default 200.
        batch_size, seed
            Spots at a time; seed of the draws.

        Returns
        -------
        pandas.DataFrame
            (spots, types); in the ``"posterior"`` mode posterior means. With `quantiles` (spots, types ×
            quantiles): ``frame.xs(0.95, axis=1, level="quantile")`` is one of them.

        Raises
        ------
        ValueError
            If quantiles or draws are asked of a mode that has point estimates only.
        """
        if self.mode != "posterior" and (quantiles is not None or n_samples is not None):
            raise ValueError(
                f"proportions={self.mode!r} gives point estimates; for credible intervals make the model "
                "with proportions='posterior'"
            )
        site = "shares" if keep_noise else "proportions"
        draws = (200 if n_samples is None else n_samples) if self.mode == "posterior" else 0
        dataset = self.dataset(adata)
        rows = as_rows(indices, dataset)
        values = self.posterior(
            site,
            adata=adata,
            indices=rows,
            n_samples=draws,
            reduce="mean" if quantiles is None else list(quantiles),
            batch_size=batch_size,
            seed=seed,
        )[site]
        names, index = list(self.columns(site) or ()), dataset.obs_names[rows]
        if quantiles is None:
            return pd.DataFrame(values, index=index, columns=names)
        columns = pd.MultiIndex.from_product([names, list(quantiles)], names=["cell_type", "quantile"])
        return pd.DataFrame(np.moveaxis(values, 0, 2).reshape(len(rows), -1), index=index, columns=columns)

    def get_scale_for_ct(
        self, cell_type: str | Sequence[str], adata: AnnData | None = None, indices: Indices = None
    ) -> pd.DataFrame:
        """Expression of a cell type as the spots see it: e^o softplus(β) softplus(W).

        It is the same in every spot.

        Parameters
        ----------
        cell_type
            A type, or several.
        adata, indices
            Spots, where one type is asked for.

        Returns
        -------
        pandas.DataFrame
            (spots, genes) for one type; (types, genes) for several.
        """
        names = [cell_type] if isinstance(cell_type, str) else list(cell_type)
        if strange := [c for c in names if c not in self.cell_types]:
            raise KeyError(
                f"there is no cell type {listed(strange)}; there are {listed(self.cell_types, 50)}"
            )
        genes = list(self.registry.var_names())
        with torch.no_grad():
            found = self.o.exp() * F.softplus(self.beta) * F.softplus(self.W)
        values = found[[self.cell_types.index(c) for c in names]].cpu().numpy()
        if not isinstance(cell_type, str):
            return pd.DataFrame(values, index=names, columns=genes)
        dataset = self.dataset(adata)
        spots = dataset.obs_names[as_rows(indices, dataset)]
        return pd.DataFrame(values.repeat(len(spots), 0), index=spots, columns=genes)
