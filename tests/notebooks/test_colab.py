"""The notebook runs from a clean kernel, and what is stored in it is what a run printed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "repvgg_jax_colab.ipynb"


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.long
def test_the_notebook_runs_from_a_clean_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += "\nconfig = config.replace(epochs=1, depths=(1, 2, 1, 1))"
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    text = printed(notebook)
    assert "predictions_changed=0, compared=256" in text
    assert "deploy.onnx: largest difference" in text
    assert "deploy.stablehlo: largest difference" in text
    assert pictures(notebook) == 6


def test_the_stored_outputs_are_those_of_one_whole_run():
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "epoch 20/20" in printed(notebook)
    assert pictures(notebook) == 6
    assert not any(output["output_type"] == "error" for cell in code for output in cell.outputs)


def test_the_stored_outputs_name_no_directory_of_the_machine_they_are_from():
    found = set(re.findall(r"(?<![\w.:/])/[a-z]+/", printed(nbformat.read(NOTEBOOK, 4))))
    assert found <= {"/tmp/"}
