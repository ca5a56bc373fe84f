"""The notebook runs from its first cell to its last, in a new folder, and its model learns the charts."""

import os
import re
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "from_data_to_chat.ipynb"
RUN_SECONDS = 900


@pytest.fixture
def program(tmp_path, monkeypatch):
    """`rlcs` of this environment on the path, as in an environment that is active."""
    script = tmp_path / "bin" / "rlcs"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore -m rlcs "$@"\n')
    script.chmod(0o755)
    scripts = sysconfig.get_path("scripts")
    monkeypatch.setenv("PATH", f"{script.parent}:{scripts}:{os.environ['PATH']}")


@pytest.mark.usefixtures("program")
def test_the_notebook_runs_from_data_to_chat(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=RUN_SECONDS, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    texts = ["".join(o.get("text", "") for o in c.outputs) for c in notebook.cells if c.cell_type == "code"]
    accuracies = re.findall(r"^(base|sft|sft_grpo) +([\d.]+)%", "".join(texts), re.M)
    measured = {arm: float(percent) for arm, percent in accuracies}
    assert set(measured) == {"base", "sft", "sft_grpo"}
    assert measured["sft_grpo"] > measured["base"] + 20, measured
    assert "200 rows can be used, 0 cannot" in texts[2]
    assert "the page is open" in "".join(texts)
    assert (tmp_path / "my-model" / "README.md").is_file()


def test_the_notebook_is_kept_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(cells) > 15 and not [c for c in cells if c.cell_type == "code" and c.outputs]
