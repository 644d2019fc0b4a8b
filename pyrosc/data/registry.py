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
from pyrosc.data.reads import UNITS, keywords_of
from pyrosc.data.schema import Field
from pyrosc.data.state import FieldState, field_state


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
            states[name] = field_state(
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
