"""docs/tour.ipynb runs from top to bottom, at a small size."""

from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, SMALL
from nbclient import NotebookClient

TINY = [
    *SMALL,
    "dataset.seq_len=32",
    "trainer.num_steps=4",
    "trainer.eval_every=2",
    "mode=disabled",
]
TINY += ["trainer.eval_tokens=256", "trainer.sample_chars=10"]


# jupyter_client and its event loop, not ours
@pytest.mark.filterwarnings("ignore")
def test_the_tour_trains_two_types_and_shows_curves_maps_and_text(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = f"options = {TINY!r}\nfolder = 'tour'"
    client = NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, timeout=300)
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.get("text", "") for output in outputs)
    assert len(images) == 3  # the curves, and the maps of two types
    assert "HAMLET:" in text and "KV cache per token" in text
    assert (tmp_path / "tour" / "mla" / "summary.json").is_file()
