"""Sphinx configuration: ``make docs`` (no network needed; warnings are errors)."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import jupytext

from pyrosc import Plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "2")

project = "pyrosc"
author = "the pyrosc developers"
copyright = "the pyrosc developers, BSD-3-Clause"
release = version = installed_version("pyrosc")
language = "en-GB"

extensions = [
    "bench_tables",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]

# --- pages ----------------------------------------------------------------------------------------

# .rst first: autosummary writes its pages with the first suffix
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
plan = Plan()
myst_substitutions = {  # defaults of the runner, as they are in the code
    "steps": f"{plan.steps:,}",
    "min_epochs": plan.min_epochs,
    "max_epochs": plan.max_epochs,
    "rise": f"{plan.rise:.0%}".replace("%", " %"),
    "warmup": f"{plan.warmup:.0%}".replace("%", " %"),
}

# --- tutorials: notebooks made from ../tutorials/*.py, executed once and cached -------------------

for script in sorted((ROOT / "tutorials").glob("*.py")):
    notebook = HERE / "tutorials" / f"{script.stem}.ipynb"
    document = jupytext.read(script)
    for i, cell in enumerate(document.cells):
        cell["id"] = f"cell-{i}"  # random ids would defeat the cache
    text = jupytext.writes(document, fmt="ipynb")
    if not notebook.exists() or notebook.read_text() != text:
        notebook.write_text(text)

# tutorials on files that are neither here nor downloaded are shown without output
data = Path(os.environ.setdefault("PYROSC_TEST_DATA", str(ROOT.parent / "shared" / "data")))
needs = {
    s.stem: re.findall(r"^# needs: (\S+)$", s.read_text(), re.MULTILINE)
    for s in (ROOT / "tutorials").glob("*.py")
}
nb_execution_excludepatterns = [
    f"tutorials/{stem}.ipynb"
    for stem, files in needs.items()
    if stem != "annotate_cells" and not all((data / f).exists() for f in files)
]

# PYROSC_DOCS_EXECUTE=off builds the pages without running the tutorials
nb_execution_mode = os.environ.get("PYROSC_DOCS_EXECUTE", "cache")
nb_execution_in_temp = True  # the tutorials write files
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True

# --- reference ------------------------------------------------------------------------------------

default_role = "py:obj"  # `Plan` in a docstring is a link
autosummary_generate = True
autodoc_typehints = "none"  # types are in the text where they need words
autodoc_member_order = "bysource"
autoclass_content = "class"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = True
napoleon_use_ivar = True

# --- look -----------------------------------------------------------------------------------------

html_theme = "furo"
html_title = "pyrosc"
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}


def escape_stars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Shapes are written as in Python, (n, *shape); in reStructuredText the star would open emphasis."""
    lines[:] = [re.sub(r"(?<![`\w*\\])\*(?=\w+\))", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", escape_stars)
