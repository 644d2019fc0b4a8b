"""The base of every model: from AnnData to a trained module and back to AnnData."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrosc.data import MAIN, Dataset, Field, Registry, preflight, schema
from pyrosc.data.inputs import as_rows, dummy_batch, encode_do, load_batch
from pyrosc.data.loader import cut
from pyrosc.infer.guides import Amortized
from pyrosc.infer.posterior import collect, stream
from pyrosc.infer.structure import prototype
from pyrosc.io import load, save
from pyrosc.models.build import Built
from pyrosc.models.describe import describe, summary
from pyrosc.models.make import make
from pyrosc.models.objective import Objective
from pyrosc.models.results import Results
from pyrosc.tools.surgery import Surgery, surgery
from pyrosc.train.loop import fit

if TYPE_CHECKING:
    from anndata import AnnData


class Model(Objective, Results, metaclass=Built):
    """A probabilistic model of cells, written as a Pyro model/guide pair.

    A subclass defines ``__init__(self, registry, **options)``, which builds parameters; ``model(...)``,
    whose annotated arguments say what it needs of an AnnData; and ``guide(...)`` with the same arguments.
    Without a guide, `pyrosc.infer.Amortized` gives an amortised one.

    Attributes
    ----------
    elbo
        Objective: `PathwiseELBO`, or ``TraceEnum_ELBO(max_plate_nesting=1)`` where sites are enumerated.
    slots
        Site name to AnnData slot ("obsm/X_scVI", "obs/…", "layers/…") for `annotate`.
    annealed
        Names of the sites whose KL is annealed; None for all local latent sites but ``library``.
    plan
        Training defaults.
    vectorized
        Whether model and guide broadcast over draws on the left of the plate over cells, so that several
        are taken in one pass. False takes them one after the other, which is right for any model.
    latent, expression
        Names of the site of the latent space and of normalised expression.
    features
        Sites of normalised expression by field, for models of several modalities: site name to the field
        whose features its columns are. Empty for models with `expression` alone.
    takes_means
        Whether the guide makes sense of the mean of counts in place of counts (``missing_genes="mean"`` of
        `pyrosc.surgery`).
    recoded
        Latent sites whose guide is a function of other latent sites and of covariates: under what-if values
        (``do``) they are decoded anew, as of the cell that is imagined, and not kept as inferred.
    effect_scale
        Scale on which differential expression compares group means of `expression`: ``"lfc"`` or
        ``"difference"``.
    label
        Name of the discrete site per cell that `predict` asks about; None for models without.
    positive
        Name of the class of interest of a label with two: `annotate` writes its probability alone.
    registries
        Registered fields by data source.
    history
        Training record, one row per epoch; None before `fit`.
    restarts
        Held-out marginal likelihood (nats per cell) of each fit of ``fit(n_restarts=)``.
    surgery
        What is kept of the reference, for models that `pyrosc.surgery` made; None for others.
    origin
        Where a converted model comes from (JSON values); None for models made here.
    """

    config: dict[str, Any]
    per_cell_guide: bool = False

    def __init__(self, registry: Registry | Mapping[str, Registry], **options: Any) -> None:
        # nn.Module.__init__ has run already (see Built); options are kept in self.config
        self.datasets: dict[str, Dataset] = {}
        self.history: pd.DataFrame | None = None
        self.restarts: list[float] | None = None
        self.surgery: Surgery | None = None
        self.origin: dict[str, Any] | None = None
        self.split: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    # -- making one -----------------------------------------------------------------------------------

    @classmethod
    def fields(cls, **options: Any) -> dict[str, Field]:
        """Fields of the model, by argument name.

        A subclass may leave some out depending on its options; those arguments then need a default.
        """
        return schema(cls.model)

    @classmethod
    def example(
        cls, adatas: Mapping[str, AnnData], keys: Mapping[str, Mapping[str, Any]], seed: int, **options: Any
    ) -> Self:
        """A model of made-up data, for `pyrosc.check_model`; for a subclass to override that is made from
        another model. Arguments as of `from_anndatas`."""
        if list(adatas) == [MAIN]:
            return cls.from_anndata(adatas[MAIN], seed=seed, **keys[MAIN], **options)
        return cls.from_anndatas(adatas, keys=keys, seed=seed, **options)

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        *,
        genes: Sequence[str] | None = None,
        unlabeled_category: str | None = None,
        standardize: bool = True,
        modalities: Mapping[str, str] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """A model for an AnnData or MuData, with weights not trained yet.

        Parameters
        ----------
        adata
            Cells; never changed.
        genes
            Names of the genes to use, in this order; default all.
        unlabeled_category
            Value of the labels that means unlabelled; NaN always does.
        standardize
            Centre continuous covariates and scale them to unit variance (kept for other data).
        modalities
            For MuData: modality by argument name.
        seed
            Seed of the starting weights; no global generator is touched.
        **options
            Where the fields are (``layer=``, ``batch_key=``, …) and the options of the model.

        Raises
        ------
        TypeError
            For an option that the model does not have, or a required field left out.
        DataError
            If the data do not fit; the message names the column, cells or genes.
        """
        return cls.from_anndatas(
            {MAIN: adata},
            keys=None,
            genes=None if genes is None else {MAIN: genes},
            unlabeled_category=unlabeled_category,
            standardize=standardize,
            modalities=modalities,
            seed=seed,
            **options,
        )

    @classmethod
    def from_anndatas(
        cls,
        adatas: Mapping[str, AnnData],
        *,
        keys: Mapping[str, Mapping[str, Any]] | None = None,
        genes: Mapping[str, Sequence[str]] | Literal["shared"] | None = None,
        ignore_case: bool = False,
        unlabeled_category: str | None = None,
        standardize: bool = True,
        modalities: Mapping[str, str] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """A model of several data sets, each with cells of its own.

        Parameters
        ----------
        adatas
            AnnData by source name, as the model's fields name them.
        keys
            Per source, where its fields are (``{"seq": {"batch_key": "donor"}}``).
        genes
            Per source, names of the genes to use; default all. ``"shared"``: those that all sources have,
            column by column the same.
        ignore_case
            Of ``"shared"``: genes whose names differ only in case are the same.
        unlabeled_category, standardize, modalities, seed, **options
            As in `from_anndata`.

        Raises
        ------
        DataError
            If the data do not fit, or the sources share no gene.
        """
        return make(
            cls,
            adatas,
            options,
            keys=keys,
            genes=genes,
            ignore_case=ignore_case,
            unlabeled_category=unlabeled_category,
            standardize=standardize,
            modalities=modalities,
            seed=seed,
        )

    @classmethod
    def from_reference(cls, reference: Model | str | Path, query: AnnData, **options: Any) -> Self:
        """A model for query cells from one that was trained on a reference; see `pyrosc.surgery`.

        Parameters
        ----------
        reference
            Trained model, or the folder of one.
        query
            Cells.
        **options
            Of `pyrosc.surgery`.
        """
        if not isinstance(reference, Model | str | Path):
            raise TypeError(
                "from_reference takes a trained model, or the folder of one, and then the query's AnnData; "
                f"the first is {type(reference).__name__}"
            )
        model = reference if isinstance(reference, Model) else load(reference, cls=cls)
        if not isinstance(model, cls):
            raise TypeError(f"the reference is a {type(model).__name__}, not a {cls.__name__}")
        return surgery(model, query, **options)  # type: ignore[return-value]

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; what surgery keeps of a reference is never in training mode."""
        super().train(mode)
        if mode and self.surgery is not None:
            self.surgery.keep_still(self)
        return self

    def setup(self) -> Self:
        """Make every parameter exist (guides made from a model need one pass), with two made-up cells."""
        prototype(self)  # a model that cannot run, or keeps parameters elsewhere, says so here
        if type(self).guide is Model.guide and not hasattr(self, "auto_guide"):
            self.auto_guide = Amortized(self)
        with torch.random.fork_rng(), torch.no_grad():
            was = self.training
            self.eval()
            self.loss(dummy_batch(self.registries, self.device))
            self.train(was)
        return self

    @property
    def knows_cells(self) -> bool:
        """Whether it has parameters of its own for each registered cell, and none for others."""
        kinds = {s.kind for r in self.registries.values() for s in r.fields.values()}
        return self.per_cell_guide or "index" in kinds

    @property
    def trained(self) -> bool:
        """Whether the weights were trained, here or where a converted model comes from."""
        return self.history is not None or self.origin is not None

    # -- the objective --------------------------------------------------------------------------------

    fit = fit  # the one runner, as a method

    # -- the posterior --------------------------------------------------------------------------------

    def batches(
        self, dataset: Dataset, rows: np.ndarray, batch_size: int = 512, source: str = MAIN
    ) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Minibatches of the cells `rows`, in that order, on the model's device.

        Yields
        ------
        tuple
            Positions in `rows`, and tensors by argument name.
        """
        device = self.device
        others = [dummy_batch({s: r}, device) for s, r in self.registries.items() if s != source]
        for positions in cut(np.arange(len(rows)), batch_size, smallest=1):
            batch = load_batch({source: dataset}, {source: rows[positions]}, device)
            for other in others:
                batch |= other
            yield positions, batch

    @property
    def train_indices(self) -> np.ndarray:
        """Rows that train, sorted; of a model of one data source that was fitted."""
        return self.split[MAIN][0]

    @property
    def validation_indices(self) -> np.ndarray:
        """Rows that are held out, sorted; of a model of one data source that was fitted."""
        return self.split[MAIN][1]

    def dataset(self, adata: AnnData | None = None, source: str = MAIN) -> Dataset:
        """The registered cells (checked for changes), or those of another AnnData."""
        if adata is None or (source in self.datasets and self.datasets[source].data is adata):
            if source not in self.datasets:
                if source not in self.registries:
                    raise ValueError(f"name the data source: source= one of {sorted(self.registries)}")
                raise ValueError(f"{type(self).__name__} was loaded without data; pass adata=")
            self.datasets[source].verify()
            return self.datasets[source]
        if not hasattr(adata, "obs_names"):
            raise TypeError(
                f"adata is an AnnData with other cells, not {adata!r}; name arguments that follow"
            )
        dataset = Dataset(adata, self.registries[source], type(self).__name__)
        preflight(dataset, self.support(), query=True)
        return dataset

    def home(self) -> AnnData:
        """The AnnData of the registered cells, into which `annotate` writes unless told otherwise."""
        return self.dataset().data

    def posterior(
        self,
        sites: Sequence[str] | str,
        *,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        n_samples: int = 0,
        reduce: str | Sequence[float] | None = "mean",
        do: Mapping[str, Any] | None = None,
        batch_size: int = 512,
        seed: int = 0,
        source: str = MAIN,
    ) -> dict[str, np.ndarray]:
        """Posterior of any sites, latent or deterministic, in one pass over the cells.

        Parameters
        ----------
        sites
            Names of sites.
        adata
            Other cells; default the registered ones. Genes are matched by name.
        indices
            Rows, in the order wanted (positions or a boolean mask); default all.
        n_samples
            Draws from the guide; 0 puts the guide's means into the model (fast, no noise).
        reduce
            ``"mean"`` over draws; None keeps them, as the first axis; numbers in [0, 1] give quantiles.
        do
            Values to put in place of registered ones in the model, not in the guide: what the cells would
            look like had they been of that batch. Categories by name, numbers on the original scale; a
            value for all cells or one per cell.
        batch_size
            Cells at a time.
        seed
            Seed of the draws; no global generator is touched.
        source
            Data source, for models that read several.

        Returns
        -------
        dict
            Site name to array: (n, ...), or (n_samples, n, ...). Discrete sites give (n, k) probabilities.
            Global sites come without n.
        """
        names = [sites] if isinstance(sites, str) else list(sites)
        dataset = self.dataset(adata, source)
        rows = as_rows(indices, dataset)
        values = stream(
            self,
            names,
            # with no cells asked for, one cell tells the shapes
            self.batches(dataset, rows if len(rows) else np.arange(1), batch_size, source),
            n_samples=n_samples,
            reduce=reduce,
            do=encode_do(self.registries[source], do, max(len(rows), 1)),
            seed=seed,
        )
        found = collect(values, len(rows), reduce == "mean")
        return {name: found[name] for name in names if name in found}

    # -- saving ---------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model to a folder (safetensors and JSON); see `pyrosc.save`."""
        save(self, path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, adata: AnnData | None = None) -> Self:
        """Read a model that `save` wrote; see `pyrosc.load`."""
        return load(path, adata, cls=cls)  # type: ignore[return-value]

    # -- repr -----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return summary(self)

    def describe(self) -> str:
        """Sites, plates and shapes of model and guide, for authors."""
        return describe(self)
