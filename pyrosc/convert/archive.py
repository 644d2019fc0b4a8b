"""Reading the file of a model saved by scvi-tools without running what it may hold.

``model.pt`` is a pickle, and a pickle can name any function of Python to be called. torch's restricted reader
calls none but those listed here; a file that names another one is refused before it is read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pyrosc.data.errors import DataError, listed

_FILE = "model.pt"
#: Files of versions before 0.15, which wrote three.
_OLD_FILES = ("model_params.pt", "attr.pkl", "var_names.csv")


class Saved(NamedTuple):
    """What is read of a saved model: tensors, genes and attributes such as the registry."""

    tensors: dict[str, torch.Tensor]
    genes: tuple[str, ...]
    attributes: dict[str, Any]


class Ignored:
    """Stands in for an object that is in the file and not needed, such as a table of the training history."""

    def __new__(cls, *_: object) -> Ignored:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*_: object) -> dict[Any, Any]:
    """In place of collections.defaultdict, into which torch's reader puts nothing."""
    return {}


# numpy 1 and 2 keep these functions under different names
_reconstruct: Any = np.ndarray.__reduce__(np.zeros(0))[0]
_scalar: Any = np.float64(0).__reduce__()[0]  # type: ignore[misc]
_DTYPES = tuple({type(np.dtype(code)) for code in "OUS?bhilqBHILQefd"})

#: Names in the file and what is called for them, beside what torch itself allows (tensors, their storage).
ALLOWED: Mapping[str, Any] = {
    "builtins.dict": dict,
    "builtins.slice": slice,
    "builtins.bytes": bytes,
    "collections.defaultdict": _plain_dict,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.dtypes.{kind.__name__}": kind for kind in _DTYPES},
}
#: Modules whose objects are not needed: nothing of theirs is called or imported.
IGNORED = ("pandas.", "pyarrow.", "torch.distributions.constraints.", "pyro.distributions.constraints.")


def read(folder: Path, prefix: str = "") -> Saved:
    """Read ``model.pt`` of a folder.

    Parameters
    ----------
    folder
        Folder that scvi-tools wrote.
    prefix
        What the names of its files begin with.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not one of scvi-tools, is of a version before 0.15, or holds anything but tensors,
        arrays and plain values.
    """
    path = folder / f"{prefix}{_FILE}"
    if not path.is_file():
        raise _absent(folder, prefix)
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise RuntimeError(f"reading {_FILE} without running code needs torch 2.6 or later")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a file that scvi-tools 1.x writes (no zip archive of torch.save)")
    try:
        known: list[Any] = [(obj, name) for name, obj in ALLOWED.items()]
        with torch.serialization.safe_globals(known):
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if refused := [name for name in others if not name.startswith(IGNORED)]:
            raise ValueError(_refusal(path, refused))
        classes = [*_DTYPES, Ignored]
        with torch.serialization.safe_globals([*known, *classes, *((Ignored, name) for name in others)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, [], str(error))) from None
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} could not be read; it may be damaged ({error})") from None
    return _checked(path, content)


def _absent(folder: Path, prefix: str) -> Exception:
    if any((folder / f"{prefix}{name}").exists() for name in _OLD_FILES):
        return ValueError(
            f"{folder} was written by scvi-tools before 0.15; scvi-tools itself brings it up to date: "
            "scvi.model.SCVI.convert_legacy_save(old_folder, new_folder), then load it and save it again"
        )
    found = sorted(p.name for p in folder.glob(f"*{_FILE}")) if folder.is_dir() else []
    if found:
        return FileNotFoundError(
            f"{folder} has no {prefix}{_FILE} but {listed(found)}; name the prefix, prefix="
            f"{found[0].removesuffix(_FILE)!r}"
        )
    return FileNotFoundError(f"{folder} holds no model of scvi-tools (no {prefix}{_FILE})")


def _refusal(path: Path, names: list[str], detail: str = "") -> str:
    what = f"it calls {listed(sorted(names))}" if names else detail.splitlines()[0]
    return (
        f"{path} was not read, and nothing in it was run: it holds more than the tensors, arrays and plain "
        f"values of a model of scvi-tools 1.x ({what}). Options that are functions, such as var_activation, "
        "cannot be carried over; otherwise, do not open the file by other means unless you trust its maker"
    )


def _checked(path: Path, content: Any) -> Saved:
    parts = ("model_state_dict", "var_names", "attr_dict")
    if not isinstance(content, dict) or any(p not in content for p in parts):
        raise ValueError(f"{path} is not a model of scvi-tools 1.x: it lacks {listed(parts)}")
    state, names, attributes = (content[p] for p in parts)
    if not isinstance(state, dict) or not isinstance(attributes, dict):
        raise ValueError(f"{path} is not a model of scvi-tools 1.x: its parts are no dictionaries")
    if isinstance(names, dict):
        raise ValueError(f"{path} holds a model of several modalities ({listed(names)}), which is not read")
    genes = tuple(map(str, names))
    if len(set(genes)) < len(genes):
        twice = sorted({g for g in genes if genes.count(g) > 1})
        raise DataError(f"the model's genes are not unique ({listed(twice)}); genes are matched by name")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return Saved(tensors, genes, attributes)
