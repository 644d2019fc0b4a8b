"""Every tutorial runs from top to bottom as a notebook."""

import os
import re
from pathlib import Path

import jupytext
import nbclient
import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))


@pytest.mark.slow
@pytest.mark.skipif(not TUTORIALS, reason="there are no tutorials")
@pytest.mark.parametrize("path", TUTORIALS or [None], ids=lambda path: path.stem if path else "none")
def test_tutorial_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    data = os.environ.get("PYROSC_TEST_DATA") or ROOT.parent / "shared" / "data"
    monkeypatch.setenv("PYROSC_TEST_DATA", str(Path(data).resolve()))  # the notebook runs in another folder
    notebook = jupytext.read(path)
    for name in re.findall(r"^# needs: (\S+)$", path.read_text(), flags=re.MULTILINE):
        if not (Path(data) / name).exists():
            pytest.skip(f"{path.name} needs {name} in the folder of test data, or the network")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells, f"{path.name} has no code"
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert all(cell.execution_count for cell in cells if cell.source.strip())
