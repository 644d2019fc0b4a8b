"""What a model needs of an AnnData, read off the signature of its ``model`` method.

``def model(self, x: Counts, batch: Batch)`` is the whole declaration: each annotation says what kind of
tensor arrives, where it lives in AnnData, and by which keyword the user names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from torch import Tensor

Kind = Literal[
    "counts",
    "categorical",
    "labels",
    "continuous",
    "categoricals",
    "continuouses",
    "size_factor",
    "total",
    "protein",
    "mask",
    "values",
    "index",
]

#: Name of the data source of models that read one AnnData only.
MAIN = "main"

_SLOTS: dict[str, str] = {
    "counts": "X",
    "total": "X",
    "protein": "obsm",
    "values": "obsm",
    "mask": "obsm",
    "index": "index",
}


@dataclass(frozen=True)
class Field:
    """One argument of ``model`` and ``guide``: its kind and where it lives.

    Calling a field returns a changed copy, so that ``Counts(source="spatial")`` is a field of its own.

    Parameters
    ----------
    kind
        ``"counts"`` (n, g) float32; ``"categorical"`` (n,) int64 codes; ``"labels"`` (n,) int64 codes with
        -1 for unlabelled; ``"continuous"`` (n,) float32, standardised; ``"categoricals"`` (n, k) int64;
        ``"continuouses"`` (n, p) float32, standardised; ``"size_factor"`` (n,) float32, positive;
        ``"total"`` (n,) float32, the cell's counts summed over all genes of the matrix that the counts field
        `of` is read from, also those that the model leaves out;
        ``"protein"`` (n, p) float32 with 0 where not measured (of a MuData: an entry of the modality's
        ``obsm``, or its ``X`` or a layer); ``"mask"`` (n, p) bool, True where the
        protein field named by `of` was measured; ``"values"`` (n, p) float32 as stored;
        ``"index"`` (n,) int64, the cell's row in the registered AnnData.
    keyword
        Keyword by which the user names the column, layer or obsm entry. Default ``"<argument>_key"``.
    optional
        Whether it may be left out. An absent categorical is one category (zeros); absent covariates, proteins
        and values are (n, 0); an absent size factor is one; absent labels are all -1.
    source
        Data source, for models that read several AnnDatas.
    modality
        Name of the MuData modality that holds it; None for an AnnData or for MuData's own obs.
    of
        For a mask: the argument that it masks; for a total: the counts that it sums.
    open
        For a categorical: whether other data may have categories that the model was not made with. Their code
        is the number of known ones, as if all were one more.
    unit
        For counts: ``"fragments"`` where reads (insertions, two per fragment) are to become fragments; the
        user says which the data are by ``counts=``. None: taken as they are.
    """

    kind: Kind
    keyword: str | None = None
    optional: bool = False
    source: str = MAIN
    modality: str | None = None
    of: str | None = None
    open: bool = False
    unit: str | None = None

    def __call__(self, **changes: Any) -> Field:
        return replace(self, **changes)

    @property
    def slot(self) -> str:
        """Where it lives: ``"X"`` (or a layer), ``"obs"``, ``"obsm"`` or ``"index"``."""
        return _SLOTS.get(self.kind, "obs")

    @property
    def several(self) -> bool:
        """Whether the user gives a list of columns."""
        return self.kind in ("categoricals", "continuouses")


if TYPE_CHECKING:  # for type checkers a field is the tensor that arrives
    Counts = Tensor
    Fragments = Tensor
    Categorical = Tensor
    Batch = Tensor
    Labels = Tensor
    Continuous = Tensor
    CategoricalCovariates = Tensor
    ContinuousCovariates = Tensor
    SizeFactor = Tensor
    Total = Tensor
    Protein = Tensor
    ProteinMask = Tensor
    Values = Tensor
    Index = Tensor
else:
    Counts = Field("counts", "layer")
    Fragments = Field("counts", "layer", unit="fragments")
    Categorical = Field("categorical")
    Batch = Field("categorical", "batch_key", optional=True)
    Labels = Field("labels", "labels_key", optional=True)
    Continuous = Field("continuous")
    CategoricalCovariates = Field("categoricals", "categorical_covariate_keys", optional=True)
    ContinuousCovariates = Field("continuouses", "continuous_covariate_keys", optional=True)
    SizeFactor = Field("size_factor", "size_factor_key", optional=True)
    Total = Field("total")
    Protein = Field("protein", "protein_key")
    ProteinMask = Field("mask")
    Values = Field("values")
    Index = Field("index")


def schema(function: Callable[..., Any]) -> dict[str, Field]:
    """Fields of a ``model`` function, by argument name, in the order of its signature.

    Raises
    ------
    TypeError
        If an argument has no field annotation, or two fields of one source share a keyword.
    """
    function = inspect.unwrap(function)
    annotations = _annotations(function)
    fields: dict[str, Field] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self":
            continue
        found = _as_field(annotations.get(name))
        if found is None:
            if parameter.default is not inspect.Parameter.empty:
                continue
            raise TypeError(
                f"argument '{name}' of {function.__qualname__} has no field annotation; write for example "
                f"'{name}: Counts' or '{name}: Batch' (fields are in pyrosc.data)"
            )
        if found.kind not in ("mask", "index", "total") and found.keyword is None:
            found = found(keyword=f"{name}_key")
        fields[name] = found
    _reject_shared_keywords(function, fields)
    return _tie(function, fields)


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    # fields of this module are known even where only a type checker, or an enclosing function, imports them
    scope = dict(globals()) | function.__globals__  # type: ignore[attr-defined]
    scope |= inspect.getclosurevars(function).nonlocals
    out: dict[str, Any] = {}
    for name, value in function.__annotations__.items():
        if isinstance(value, str):
            try:
                value = eval(value, scope)  # what typing.get_type_hints does, one name at a time
            except NameError:
                continue  # a name only a type checker knows; reported as missing where it matters
        out[name] = value
    return out


def _as_field(annotation: Any) -> Field | None:
    if isinstance(annotation, Field):
        return annotation
    if get_origin(annotation) is Annotated:
        return next((m for m in get_args(annotation)[1:] if isinstance(m, Field)), None)
    return None


def _reject_shared_keywords(function: Callable[..., Any], fields: dict[str, Field]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for name, field in fields.items():
        if field.keyword is None:
            continue
        where = (field.source, field.keyword)
        if where in seen:
            raise TypeError(
                f"arguments '{seen[where]}' and '{name}' of {function.__qualname__} share the keyword "
                f"'{field.keyword}'; give one of them its own, for example Counts(keyword='{name}_layer')"
            )
        seen[where] = name


def _tie(function: Callable[..., Any], fields: dict[str, Field]) -> dict[str, Field]:
    """Masks to the proteins they mask, totals to the counts they sum."""
    proteins = [n for n, f in fields.items() if f.kind == "protein"]
    for name, field in fields.items():
        if field.kind == "mask" and field.of is None:
            if len(proteins) != 1:
                raise TypeError(
                    f"'{name}' of {function.__qualname__} must say which protein field it masks, for "
                    f"example ProteinMask(of='y')"
                )
            fields[name] = field(of=proteins[0])
        if field.kind == "mask" and fields[name].of not in proteins:
            raise TypeError(f"'{name}' of {function.__qualname__} masks '{field.of}', not a protein field")
        if field.kind == "total":
            counts = [n for n, f in fields.items() if f.kind == "counts" and f.source == field.source]
            if field.of is None and len(counts) == 1:
                fields[name] = field(of=counts[0])
            elif field.of not in counts:
                raise TypeError(
                    f"'{name}' of {function.__qualname__} must say which counts it sums, for example "
                    "Total(of='x')"
                )
    return fields
