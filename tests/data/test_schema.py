"""A model's signature says what it needs of an AnnData."""

from __future__ import annotations

from typing import Annotated

import pytest
from torch import Tensor

from pyrosc.data import (
    Batch,
    Categorical,
    Continuous,
    Counts,
    Field,
    Index,
    Labels,
    Protein,
    ProteinMask,
    schema,
)

SPOTS = Field("counts", "spots", source="spatial")


def test_fields_come_in_the_order_of_the_signature():
    def model(self, x: Counts, batch: Batch, age: Continuous, cell: Index): ...

    fields = schema(model)
    assert list(fields) == ["x", "batch", "age", "cell"]
    assert [f.kind for f in fields.values()] == ["counts", "categorical", "continuous", "index"]
    assert [f.keyword for f in fields.values()] == ["layer", "batch_key", "age_key", None]
    assert fields["batch"].optional
    assert not fields["age"].optional
    assert [f.slot for f in fields.values()] == ["X", "obs", "obs", "index"]


@pytest.mark.parametrize(
    "annotation",
    [
        SPOTS,
        Annotated[Tensor, SPOTS],
        "SPOTS",
        "Annotated[Tensor, SPOTS]",
        "Annotated[Tensor, Field('counts', 'spots', source='spatial')]",
        "Counts(keyword='spots', source='spatial')",
    ],
)
def test_every_way_to_write_a_field(annotation):
    def model(x): ...

    model.__annotations__ = {"x": annotation}
    assert schema(model) == {"x": SPOTS}


def test_fields_imported_inside_of_a_function():
    from typing import Annotated as Tagged

    from pyrosc.data import SizeFactor
    from pyrosc.data import Values as Numbers

    mine = Numbers(keyword="pca_key")

    def model(size: SizeFactor, pca: mine, y: Tagged[Tensor, SizeFactor(keyword="other")]):
        return mine, Numbers, Tagged, SizeFactor  # a closure, so that the names can be found

    assert schema(model)["size"].kind == "size_factor"
    assert schema(model)["pca"] == Field("values", "pca_key")
    assert schema(model)["y"].keyword == "other"


@pytest.mark.parametrize(
    "annotation", ["SizeFactor", "SizeFactor(source='a')", "Annotated[Tensor, SizeFactor]"]
)
def test_fields_of_the_package_are_known_without_a_closure(annotation):
    def model(size): ...

    model.__annotations__ = {"size": annotation}
    assert schema(model)["size"].kind == "size_factor"


def test_calling_a_field_leaves_it_unchanged():
    before = Field("counts", "layer")
    assert before(source="a").source == "a"
    assert before.source == "main"


@pytest.mark.parametrize("annotation", [None, Tensor, "Tensor", "NoSuchName"])
def test_an_argument_without_field_is_an_error(annotation):
    def model(self, x: Counts, extra): ...

    if annotation is not None:
        model.__annotations__["extra"] = annotation
    with pytest.raises(TypeError, match=r"'extra' of .*model has no field annotation.*extra: Counts"):
        schema(model)


def test_an_argument_with_a_default_needs_no_field():
    def model(self, x: Counts, scale: float = 1.0): ...

    assert list(schema(model)) == ["x"]


def test_two_fields_with_one_keyword_are_an_error():
    def model(self, x: Counts, y: Counts): ...

    with pytest.raises(TypeError, match=r"'x' and 'y' .* share the keyword 'layer'.*keyword='y_layer'"):
        schema(model)


def test_one_keyword_in_two_sources_is_fine():
    def model(self, x: Counts(source="seq"), y: Counts(source="spatial")): ...

    assert [f.source for f in schema(model).values()] == ["seq", "spatial"]


def test_a_mask_belongs_to_the_only_protein():
    def model(self, y: Protein, mask: ProteinMask): ...

    assert schema(model)["mask"].of == "y"


def test_a_mask_of_two_proteins_must_say_which():
    def unclear(y: Protein, w: Protein(keyword="w_key"), mask: ProteinMask): ...
    def clear(y: Protein, w: Protein(keyword="w_key"), mask: ProteinMask(of="w")): ...

    with pytest.raises(TypeError, match="must say which protein field it masks"):
        schema(unclear)
    assert schema(clear)["mask"].of == "w"


def test_a_mask_of_something_else_is_an_error():
    def model(y: Protein, group: Categorical, labels: Labels, mask: ProteinMask(of="group")): ...

    with pytest.raises(TypeError, match="masks 'group', not a protein field"):
        schema(model)
