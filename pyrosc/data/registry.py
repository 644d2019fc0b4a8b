"""What a model remembers of the data it was made for: names, categories, scales. Never the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pyrosc.data import encode as enc
from pyrosc.data.errors import DataError, listed
from pyrosc.data.proteins import panels
from pyrosc.data.proteins import read as read_proteins
from pyrosc.data.reads import UNITS, are_reads, keywords_of
from pyrosc.data.schema import Field


@dataclass(frozen=True)
class FieldState:
    """One field as registered.

    Attributes
    ----------
    kind
        Kind of the field (see `Field`).
    keys
        What the user named: the layer (none for ``X``), columns of ``obs``, or the entry of ``obsm``.
    given
        False for an optional field that was left out.
    modality
        MuData modality, or None.
    categories
        One tuple of category names per key, in code order.
    names
        Names of the features: genes of counts, columns of a protein table or of values.
    loc, scale
        Mean and standard deviation of each continuous key; kept and re-used for other data.
    unlabeled
        Name that means unlabelled, for labels.
    of
        For a mask: the field that it masks; for a total: the counts that it sums.
    n_summed
        For a total: number of genes that were summed.
    open
        For a categorical: whether other data may have categories that are not known (see `Field`).
    missing
        Names of features that some data may lack (of a query): they are zero there, and not observed.
    withheld
        For labels: whether all cells are taken as unlabelled, whatever the column holds.
    matrix
        For proteins: whether they are in ``X`` or the layer `keys` of a modality, not in ``obsm``.
    by
        For proteins and their mask: the categorical field of the batches, whose panels may differ.
    silent
        For proteins and their mask: (category of `by`, then proteins) that were zero in all of its cells, and
        are taken as not measured there.
    means
        For counts: mean of each feature over the cells, to six digits; empty where not worked out.
    reads
        For counts of fragments: whether the values are reads, of which x are ceil(x/2) fragments. None for
        other fields.
    """

    kind: str
    keys: tuple[str, ...] = ()
    given: bool = True
    modality: str | None = None
    categories: tuple[tuple[str, ...], ...] = ()
    names: tuple[str, ...] = ()
    loc: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    unlabeled: str | None = None
    of: str | None = None
    n_summed: int = 0
    open: bool = False
    missing: tuple[str, ...] = ()
    withheld: bool = False
    matrix: bool = False
    by: str | None = None
    silent: tuple[tuple[str, ...], ...] = ()
    reads: bool | None = None
    means: tuple[float, ...] = ()

    @property
    def where(self) -> str:
        """How to write it in Python, for messages: ``obs['batch']``, ``layers['counts']``."""
        prefix = f"mod['{self.modality}']." if self.modality else ""
        if self.kind in ("counts", "total") or self.matrix:
            return prefix + (f"layers['{self.keys[0]}']" if self.keys else "X")
        slot = "obsm" if self.kind in ("protein", "values", "mask") else "obs"
        return prefix + f"{slot}[{listed(self.keys)}]"


@dataclass(frozen=True)
class Registry:
    """Names, categories and scales of the registered data; survives a JSON round trip unchanged.

    Attributes
    ----------
    n_obs
        Number of cells at registration.
    fields
        State of each field, by argument name of the model.
    obs_names
        Names of the cells, kept only where a field refers to single cells (``Index``).
    fingerprints
        Shape, non-zeros and checksum of each count matrix at registration.
    """

    n_obs: int
    fields: Mapping[str, FieldState]
    obs_names: tuple[str, ...] | None = None
    fingerprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    # -- what models ask ------------------------------------------------------------------------------

    def n_vars(self, name: str | None = None) -> int:
        """Number of features of a counts, protein or values field; default the first counts field."""
        return len(self.var_names(name))

    def var_names(self, name: str | None = None) -> tuple[str, ...]:
        """Names of the features of a field; default the first counts field."""
        if name is None:
            name = next((n for n, s in self.fields.items() if s.kind == "counts"), None)
            if name is None:
                raise KeyError("the model has no counts field; name the field")
        return self.fields[name].names

    def categories(self, name: str, key: str | None = None) -> tuple[str, ...]:
        """Category names of a field in code order; `key` picks one of several columns."""
        state = self.fields[name]
        if not state.given:
            return () if state.kind == "labels" else ("all",)
        if key is None:
            if len(state.keys) != 1:
                raise KeyError(f"'{name}' has the columns {state.keys}; name one")
            return state.categories[0]
        return state.categories[state.keys.index(key)]

    def n_categories(self, name: str, key: str | None = None) -> int:
        """Number of categories; 1 for an absent categorical, 0 for absent labels."""
        return len(self.categories(name, key))

    def keys(self, name: str) -> tuple[str, ...]:
        """Columns given for a field; empty when it was left out."""
        return self.fields[name].keys if self.fields[name].given else ()

    def given(self, name: str) -> bool:
        """Whether the user gave an optional field."""
        return self.fields[name].given

    def keywords(self, fields: Mapping[str, Field]) -> dict[str, Any]:
        """What ``from_anndata`` was given: keywords to register the same fields again.

        Parameters
        ----------
        fields
            Fields of the model, by argument name.
        """
        found: dict[str, Any] = {}
        for name, state in self.fields.items():
            keyword = fields[name].keyword
            if state.reads is not None and state.kind == "counts":
                found[UNITS] = "reads" if state.reads else "fragments"
            if keyword and state.given and state.keys and state.kind != "mask":
                found[keyword] = list(state.keys) if fields[name].several else state.keys[0]
        modalities = {n: s.modality for n, s in self.fields.items() if s.modality}
        numbers = [s for s in self.fields.values() if s.kind in ("continuous", "continuouses") and s.given]
        if numbers and all(set(s.loc) == {0.0} and set(s.scale) == {1.0} for s in numbers):
            found["standardize"] = False
        return found | ({"modalities": modalities} if modalities else {})

    def restrict(self, genes: Sequence[str]) -> Registry:
        """The same with only these genes, in this order, in each counts field that has the first one's.

        Raises
        ------
        DataError
            For a gene that is not there, or named twice.
        """
        genes = tuple(map(str, genes))
        if not genes or len(set(genes)) < len(genes):
            twice = sorted({g for g in genes if genes.count(g) > 1})
            raise DataError(f"genes names some twice: {listed(twice)}" if twice else "genes is empty")
        every = self.var_names()
        if absent := sorted(set(genes) - set(every)):
            raise DataError(f"the data have no genes {listed(absent)}; genes are matched by var_names")
        states = {
            n: replace(s, names=genes) if s.kind == "counts" and s.names == every else s
            for n, s in self.fields.items()
        }
        return replace(self, fields=states)

    def with_fingerprints(self, fingerprints: Mapping[str, Mapping[str, Any]]) -> Registry:
        """The same with the fingerprints of its matrices."""
        return replace(self, fingerprints=dict(fingerprints))

    def with_means(self, sums: Mapping[str, np.ndarray]) -> Registry:
        """The same with the means of its counts, from their sums over the cells by field."""
        means = {n: tuple(float(f"{v:.6g}") for v in s / max(self.n_obs, 1)) for n, s in sums.items()}
        return replace(
            self, fields={n: replace(s, means=means[n]) if n in means else s for n, s in self.fields.items()}
        )

    # -- making one -----------------------------------------------------------------------------------

    @classmethod
    def from_data(
        cls,
        data: Any,
        fields: Mapping[str, Field],
        keys: Mapping[str, Any],
        *,
        unlabeled: str | None = None,
        standardize: bool = True,
        modalities: Mapping[str, str] | None = None,
        owner: str = "the model",
    ) -> Registry:
        """Look up every field in an AnnData or MuData.

        Parameters
        ----------
        data
            AnnData or MuData.
        fields
            Fields by argument name (`schema`).
        keys
            What the user gave, by keyword.
        unlabeled
            Category of the labels that means unlabelled (NaN always does).
        standardize
            Whether continuous covariates are centred and scaled to unit variance.
        modalities
            MuData modality by argument name, over those that the fields name.
        owner
            Name of the model, for messages.

        Raises
        ------
        TypeError
            For an unknown keyword or a required one left out.
        DataError
            For a missing column, layer, obsm entry or modality.
        """
        keys = {k: v for k, v in keys.items() if v is not None}
        known = keywords_of(fields)
        if unknown := sorted(keys.keys() - known):
            raise TypeError(f"{owner} takes {listed(sorted(known), 20)}; it does not know {listed(unknown)}")
        modalities = dict(modalities or {})
        if strange := sorted(modalities.keys() - fields.keys()):
            raise TypeError(
                f"modalities names {listed(strange)}; {owner} has the fields {listed(fields, 20)}"
            )
        states = {}
        for name, spec in fields.items():
            modality = modalities.get(name, spec.modality if hasattr(data, "mod") else None)
            states[name] = _state(
                data, name, replace(spec, modality=modality), keys, unlabeled, standardize, owner
            )
        states |= panels(data, states)
        for name, state in states.items():
            if state.kind == "total":
                assert state.of is not None
                target = states[state.of]
                width = int(enc.part(data, target.modality).n_vars)
                states[name] = replace(
                    state, keys=target.keys, modality=target.modality, n_summed=width, reads=target.reads
                )
            if state.kind == "mask":
                assert state.of is not None
                target = states[state.of]
                states[name] = replace(target, kind="mask", of=state.of)
        needs_names = any(s.kind == "index" for s in states.values())
        if needs_names and not data.obs_names.is_unique:
            twice = data.obs_names[data.obs_names.duplicated()].unique()
            raise DataError(
                f"obs_names are not unique ({listed(twice)}), and {owner} knows each cell by its name; call "
                "adata.obs_names_make_unique()"
            )
        return cls(
            n_obs=int(data.n_obs),
            fields=states,
            obs_names=tuple(map(str, data.obs_names)) if needs_names else None,
        )

    def extend(self, data: Any, *, labels: bool = True, missing: bool = False) -> Registry:
        """The same fields for query data: categories not seen before are appended, codes stay.

        Labels are not extended: a label that the model was not trained on is unlabelled to it.

        Parameters
        ----------
        data
            AnnData or MuData of the query.
        labels
            Whether the query's labels are used; False takes all of its cells as unlabelled.
        missing
            Whether the query may lack genes, which are then remembered.
        """
        states = {}
        for name, state in self.fields.items():
            if state.kind == "counts" and missing:
                has = set(map(str, enc.part(data, state.modality).var_names)) - set(state.missing)
                state = replace(state, missing=tuple(g for g in state.names if g not in has))
            if state.kind == "labels":
                state = replace(state, withheld=not labels)
            if state.kind in ("categorical", "categoricals") and state.given:
                adata = enc.part(data, state.modality)
                grown = []
                for key, old in zip(state.keys, state.categories, strict=True):
                    new = enc.category_order(enc.column(adata, key))
                    grown.append(old + tuple(c for c in new if c not in old))
                state = replace(state, categories=tuple(grown))
            states[name] = state
        states |= panels(data, states, before=self.fields)
        for name, state in states.items():
            if state.kind == "mask" and state.of is not None:
                states[name] = replace(states[state.of], kind="mask", of=state.of)
        names = tuple(map(str, data.obs_names)) if self.obs_names is not None else None
        return Registry(int(data.n_obs), states, names)

    # -- JSON -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self) | {"fields": {n: asdict(s) for n, s in self.fields.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Registry:
        """Inverse of `to_dict`, also after a JSON round trip."""
        values = dict(values)
        states = {n: FieldState(**{k: _frozen(v) for k, v in s.items()}) for n, s in values["fields"].items()}
        names = values.get("obs_names")
        return cls(
            n_obs=values["n_obs"],
            fields=states,
            obs_names=tuple(names) if names is not None else None,
            fingerprints=dict(values.get("fingerprints") or {}),
        )

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Registry:
        """From JSON text."""
        return cls.from_dict(json.loads(text))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _state(
    data: Any,
    name: str,
    spec: Field,
    keys: Mapping[str, Any],
    unlabeled: str | None,
    standardize: bool,
    owner: str,
) -> FieldState:
    base = FieldState(spec.kind, modality=spec.modality, of=spec.of, open=spec.open)
    given = keys.get(spec.keyword) if spec.keyword else None
    if spec.kind in ("index", "mask", "total"):
        return base
    adata = enc.part(data, spec.modality, aligned=spec.kind != "protein")
    if spec.kind == "counts":
        if hasattr(adata, "mod"):
            first = next(iter(adata.mod))
            raise DataError(
                f"the counts of '{name}' are in a modality of the MuData (it has {listed(adata.mod)}): name "
                f"it, modalities={{'{name}': '{first}'}}"
            )
        names = tuple(map(str, adata.var_names))
        if given in (None, "X"):
            if adata.X is None:
                raise DataError(f"{owner} reads counts from X, which is empty; name a layer: layer='counts'")
            state, matrix = replace(base, names=names), adata.X
        elif given not in adata.layers:
            raise DataError(f"there is no layer '{given}'; layers are {listed(adata.layers, 12) or 'none'}")
        else:
            state, matrix = replace(base, keys=(str(given),), names=names), adata.layers[given]
        return state if spec.unit is None else replace(state, reads=are_reads(matrix, keys, state.where))
    columns = _columns(given, spec, name, owner)
    if spec.kind == "protein" and spec.modality is not None and not _in_obsm(adata, columns):
        state = replace(base, keys=() if columns in ((), ("X",)) else columns, matrix=True)
        return replace(state, names=read_proteins(data, state)[1])
    if not columns:
        if not spec.optional:
            hint = ""
            if spec.kind == "protein" and hasattr(data, "mod"):
                hint = f"; of a MuData name their modality, modalities={{'{name}': '{list(data.mod)[-1]}'}}"
            raise TypeError(
                f"{owner} needs {spec.keyword}= (its argument '{name}', a {spec.kind} field){hint}"
            )
        return replace(base, given=False)
    if spec.slot == "obsm":
        _, names = enc.table(adata, columns[0])
        return replace(base, keys=columns, names=names)
    if spec.kind in ("categorical", "categoricals"):
        orders = tuple(enc.category_order(enc.column(adata, c)) for c in columns)
        return replace(base, keys=columns, categories=orders)
    if spec.kind == "labels":
        order = enc.category_order(enc.column(adata, columns[0]))
        order = tuple(c for c in order if c != unlabeled)
        return replace(base, keys=columns, categories=(order,), unlabeled=unlabeled)
    values = np.stack([enc.numbers(adata, c) for c in columns], axis=1)
    if spec.kind == "size_factor" or not standardize:
        return replace(base, keys=columns, loc=(0.0,) * len(columns), scale=(1.0,) * len(columns))
    loc = np.nanmean(values, axis=0)
    scale = np.nanstd(values, axis=0)
    scale[~(scale > 0)] = 1.0  # a constant column stays zero; preflight warns about it
    return replace(base, keys=columns, loc=tuple(loc.tolist()), scale=tuple(scale.tolist()))


def _in_obsm(adata: Any, columns: tuple[str, ...]) -> bool:
    """Whether a name means an entry of ``obsm``: unless there is only a layer of that name."""
    return (
        bool(columns) and columns != ("X",) and (columns[0] in adata.obsm or columns[0] not in adata.layers)
    )


def _columns(given: Any, spec: Field, name: str, owner: str) -> tuple[str, ...]:
    if given is None:
        return ()
    if spec.several:
        if isinstance(given, str):
            raise TypeError(f"{owner}: {spec.keyword} takes a list of column names; write ['{given}']")
        columns = tuple(str(c) for c in given)
        if len(set(columns)) < len(columns):
            raise DataError(f"{owner}: {spec.keyword} names a column twice: {listed(columns)}")
        return columns
    if not isinstance(given, str):
        raise TypeError(f"{owner}: {spec.keyword} takes one name, not {given!r}")
    return (given,)
