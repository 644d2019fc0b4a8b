"""The base of every model: from AnnData to a trained module and back to AnnData."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrosc.data import MAIN, Dataset, Field, Registry, preflight, schema
from pyrosc.data.genes import shared_genes
from pyrosc.data.inputs import as_rows, dummy_batch, encode_do, load_batch, present_key, rows_key
from pyrosc.data.loader import cut
from pyrosc.data.reads import keywords_of
from pyrosc.infer.elbo import PathwiseELBO
from pyrosc.infer.guides import Amortized
from pyrosc.infer.handlers import Anneal, Measured, Record, cells_plate
from pyrosc.infer.posterior import collect, stream
from pyrosc.infer.structure import enumerated_sites, latent_sites, prototype
from pyrosc.io import load, save
from pyrosc.models.build import Built, reject_unknown
from pyrosc.models.describe import describe, summary
from pyrosc.models.results import Results
from pyrosc.tools.surgery import Surgery, surgery
from pyrosc.train.loop import fit
from pyrosc.train.plan import Plan

if TYPE_CHECKING:
    from anndata import AnnData


_CURRENT: ContextVar[Model | None] = ContextVar("pyrosc_model", default=None)


def cells(x: Tensor, source: str = MAIN) -> pyro.plate:
    """The plate over the minibatch's cells, for model functions that have no ``self``.

    Parameters
    ----------
    x
        Any argument of the model for these cells, (n, ...).
    source
        Data source of the cells.
    """
    model = _CURRENT.get()
    return pyro.plate("cells", len(x), dim=-1) if model is None else model.cells(x, source)


class Model(nn.Module, Results, metaclass=Built):
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

    elbo: ELBO = PathwiseELBO()
    slots: ClassVar[Mapping[str, str]] = {}
    annealed: tuple[str, ...] | None = None
    plan: Plan = Plan()
    vectorized: ClassVar[bool] = False
    latent: ClassVar[str] = "z"
    expression: ClassVar[str] = "rho"
    effect_scale: str = "lfc"
    label: ClassVar[str | None] = None
    positive: ClassVar[str | None] = None

    registries: dict[str, Registry]
    config: dict[str, Any]
    n_train: dict[str, int]
    auto_guide: nn.Module
    per_cell_guide: bool = False
    _rows: dict[str, Tensor]
    _latents: dict[str, bool]
    _summed_out: set[str]

    def __init__(self, registry: Registry | Mapping[str, Registry], **options: Any) -> None:
        # nn.Module.__init__ has run already (see Built); options are kept in self.config
        self.datasets: dict[str, Dataset] = {}
        self.history: pd.DataFrame | None = None
        self.restarts: list[float] | None = None
        self.surgery: Surgery | None = None
        self.origin: dict[str, Any] | None = None
        self.split: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    # -- what a subclass writes -----------------------------------------------------------------------

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

    def auxiliary(self, batch: dict[str, Tensor], sites: dict[str, Tensor], step: int) -> dict[str, Tensor]:
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
        fields = cls.fields(**options)
        sources = list(dict.fromkeys(f.source for f in fields.values()))
        if set(adatas) != set(sources):
            raise TypeError(f"{cls.__name__} reads the sources {sources}; got {sorted(adatas)}")
        keywords = keywords_of(fields)
        given = {k: options.pop(k) for k in list(options) if k in keywords}
        reject_unknown(cls, options, keywords)
        if isinstance(genes, str) and genes != "shared":
            raise ValueError(f"genes is 'shared' or a list per source; got {genes!r}")
        if ignore_case and genes != "shared":
            raise ValueError("ignore_case= is of genes='shared'")
        registries = {}
        for source in sources:
            own = {n: f for n, f in fields.items() if f.source == source}
            mine = given if len(sources) == 1 else dict((keys or {}).get(source, {}))
            registries[source] = Registry.from_data(
                adatas[source],
                own,
                mine,
                unlabeled=unlabeled_category,
                standardize=standardize,
                modalities=modalities,
                owner=cls.__name__,
            )
        if genes == "shared":
            genes = shared_genes({s: r.var_names() for s, r in registries.items()}, ignore_case=ignore_case)
        for source, own_genes in (genes or {}).items():  # type: ignore[union-attr]  # no str any more
            registries[source] = registries[source].restrict(own_genes)
        datasets = {s: Dataset(adatas[s], r, cls.__name__) for s, r in registries.items()}
        registries = {s: r.with_fingerprints(datasets[s].fingerprints()) for s, r in registries.items()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self: Self = cls(registries[MAIN] if sources == [MAIN] else registries, **options)
            self.datasets = datasets
            for dataset in datasets.values():
                preflight(dataset, self.support())
            self.setup()
            self.initialize(datasets[MAIN] if sources == [MAIN] else datasets)
        return self.eval()

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
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def knows_cells(self) -> bool:
        """Whether it has parameters of its own for each registered cell, and none for others."""
        kinds = {s.kind for r in self.registries.values() for s in r.fields.values()}
        return self.per_cell_guide or "index" in kinds

    @property
    def trained(self) -> bool:
        """Whether the weights were trained, here or where a converted model comes from."""
        return self.history is not None or self.origin is not None

    @property
    def registry(self) -> Registry:
        """The registry of a model of one data source."""
        if MAIN not in self.registries:
            raise AttributeError(f"{type(self).__name__} has several registries: {sorted(self.registries)}")
        return self.registries[MAIN]

    # -- the objective --------------------------------------------------------------------------------

    def cells(self, x: Tensor, source: str = MAIN) -> pyro.plate:
        """The plate over the cells of a minibatch: dim −1, scaled to the number of training cells.

        Called outside of `forward` (on a whole data set, say, for MCMC) it holds the cells given.

        Parameters
        ----------
        x
            Any argument of the model for these cells, (n, ...).
        source
            Data source of the cells.
        """
        name = cells_plate(source)
        rows = self._rows.get(source) if hasattr(self, "_rows") else None
        if rows is None:
            return pyro.plate(name, len(x), dim=-1)
        return pyro.plate(name, self.n_train[source], subsample=rows, dim=-1)

    @contextmanager
    def minibatch(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Tell `cells` which rows of the training data the arguments are; leave out what was not measured."""
        rows = {s: batch[rows_key(s)] for s in self.registries if rows_key(s) in batch}
        present = {n: batch[present_key(n)] for n in batch if present_key(n) in batch}
        if self.surgery is not None and self.surgery.missing_genes == "zero":
            present = {}
        outer = getattr(self, "_rows", {}), getattr(self, "_present", {})
        token = _CURRENT.set(self)
        try:
            object.__setattr__(self, "_rows", rows)
            object.__setattr__(self, "_present", present)
            with (
                Measured({n: (batch[n], which) for n, which in present.items()}) if present else nullcontext()
            ):
                yield
        finally:
            _CURRENT.reset(token)
            object.__setattr__(self, "_rows", outer[0])
            object.__setattr__(self, "_present", outer[1])

    def measured(self, field: str) -> Tensor | None:
        """Which genes of a counts field the cells of the minibatch at hand have, (g,) bool; None for all.

        The others are zero, and their likelihood is left out; see `pyrosc.surgery`.
        """
        present: dict[str, Tensor] = getattr(self, "_present", {})
        return present.get(field)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments of model and guide in a minibatch."""
        return {k: v for k, v in batch.items() if not k.startswith("_")}

    def loss(
        self, batch: Mapping[str, Tensor], kl_weight: float = 1.0, record: Record | None = None
    ) -> Tensor:
        """Negative ELBO per cell of a minibatch, with the KL of `annealed` sites at a weight."""
        anneal = nullcontext() if kl_weight == 1 else Anneal(kl_weight, self.annealed_sites)
        with self.minibatch(batch), anneal, record or nullcontext():
            inputs = self.inputs(batch)
            elbo: Any = self.elbo  # Pyro's base class does not declare its losses
            if torch.is_grad_enabled():
                value = elbo.differentiable_loss(self.model, self.guide, **inputs)
            else:  # TraceEnum_ELBO insists on a gradient in differentiable_loss
                value = torch.as_tensor(elbo.loss(self.model, self.guide, **inputs))
        return value / sum(self.n_train.values())

    def forward(self, batch: Mapping[str, Tensor], kl_weight: float = 1.0) -> Tensor:
        """Negative ELBO per cell (nats) of one minibatch: what is differentiated, and what DDP wraps."""
        return self.loss(batch, kl_weight)

    @property
    def annealed_sites(self) -> tuple[str, ...]:
        """Sites whose KL is annealed: `annealed`, or the local latent sites but the library."""
        if self.annealed is not None:
            return self.annealed
        return tuple(s for s in self.latent_sites(local=True) if s not in {"library", *self.summed_out})

    def latent_sites(self, local: bool | None = None) -> list[str]:
        """Names of the latent sites of the model; local ones are inside the plate over cells."""
        if not hasattr(self, "_latents"):
            object.__setattr__(self, "_latents", latent_sites(self))
        return [name for name, is_local in self._latents.items() if local is None or is_local == local]

    @property
    def summed_out(self) -> set[str]:
        """Names of the discrete sites that the model enumerates, so that the guide has none of them."""
        if not hasattr(self, "_summed_out"):
            object.__setattr__(self, "_summed_out", enumerated_sites(self))
        return self._summed_out

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
