"""The notebooks: paired with a text form, stored without outputs, and running from top to bottom."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from experiments import bench_notebooks, notebook

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def cells(script: Path, kind: str) -> list[str]:
    return [cell.source for cell in jupytext.read(script).cells if cell.cell_type == kind]


def test_there_are_five_and_each_has_both_forms() -> None:
    assert [path.name[:1] for path in SCRIPTS] == ["1", "2", "3", "4", "5"]
    assert sorted(path.with_suffix(".py") for path in (ROOT / "notebooks").glob("*.ipynb")) == SCRIPTS


@scripts
def test_both_forms_hold_the_same_and_no_outputs(script: Path) -> None:
    stored, text = nbformat.read(script.with_suffix(".ipynb"), as_version=4), jupytext.read(script)
    nbformat.validate(stored)
    command = f"jupytext --to ipynb notebooks/{script.name}"
    assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in text.cells], command
    assert stored.metadata.kernelspec == text.metadata.kernelspec
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code), command


@scripts
def test_they_define_nothing_but_plots(script: Path) -> None:
    tree = ast.parse(script.read_text())
    defined = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert all(isinstance(node, ast.FunctionDef) and node.name.startswith("plot_") for node in defined)
    assert any(isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("mfa_jax.") for node in tree.body)


@scripts
def test_their_text_states_no_result(script: Path) -> None:
    """No number with a decimal point, no percentage: what was measured stands in figures and outputs."""
    for text in cells(script, "markdown"):
        assert not re.search(r"\d\.\d|\d *(%|times)", re.sub(r"`[^`]*`|arXiv [0-9.]+", "", text)), text


def test_the_whole_loop_is_ten_cells() -> None:
    assert len(cells(SCRIPTS[1], "code")) == 10


# ---- the first cell --------------------------------------------------------------------------------------------


def test_the_first_cell_is_the_same_everywhere() -> None:
    assert len({cells(script, "code")[0] for script in SCRIPTS}) == 1


def run_first_cell(monkeypatch: pytest.MonkeyPatch, source: str, environment: dict[str, str]) -> list[Any]:
    """The commands that the cell calls."""
    called: list[Any] = []
    for name in [name for name in os.environ if name.startswith("COLAB_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "check_call", called.append)
    exec(cells(SCRIPTS[0], "code")[0].replace("/content/mfa_jax", source), {})
    return called


def test_the_first_cell_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_first_cell(monkeypatch, "/content/mfa_jax", {}) == []


# As Colab sets them on its runtimes.
@pytest.mark.parametrize(("device", "extra"), [
    ({"COLAB_GPU": "", "COLAB_TPU_1VM": ""}, ""), ({"COLAB_GPU": "1", "COLAB_TPU_1VM": ""}, "cuda12"),
    ({"COLAB_GPU": "", "COLAB_TPU_1VM": "1"}, "tpu")])
@pytest.mark.parametrize(("source", "place"), [
    ("/content/mfa_jax", "file:///content/mfa_jax"), ("https://host/mfa_jax", "git+https://host/mfa_jax")])
def test_on_colab_the_first_cell_installs_for_the_device(
    device: dict[str, str], extra: str, source: str, place: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = run_first_cell(monkeypatch, source, {"COLAB_RELEASE_TAG": "release", **device})
    assert called == [[sys.executable, "-m", "pip", "install", "-q", f"mfa_jax[{extra}] @ {place}"]]


def test_on_colab_nothing_goes_on_with_an_older_package_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["numpy"], "__version__", "1.0")
    with pytest.raises(SystemExit, match=r"Restart the session .* older \['numpy'\] are loaded"):
        run_first_cell(monkeypatch, "/content/mfa_jax", {"COLAB_RELEASE_TAG": "release"})


# ---- running ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@scripts
def test_they_run_from_top_to_bottom(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smallest size, from the stored form, in a kernel of their own."""
    monkeypatch.setenv(notebook.VARIABLE, "tiny")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    loaded = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    client = NotebookClient(loaded, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in loaded.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    tree = ast.parse(script.read_text())
    shown = [node.value.func.id for node in tree.body if isinstance(node, ast.Expr)
             and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)]
    assert len(pictures) == sum(name.startswith("plot_") or name == "roofline" for name in shown) > 0


# ---- sizes -----------------------------------------------------------------------------------------------------


def test_the_size_follows_the_device_unless_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notebook.VARIABLE, raising=False)
    for platform, size in (("cpu", "cpu"), ("gpu", "accelerator"), ("tpu", "accelerator")):
        monkeypatch.setattr(notebook.jax, "default_backend", lambda platform=platform: platform)
        assert notebook.size() == size
    monkeypatch.setenv(notebook.VARIABLE, "tiny")
    assert notebook.pick(tiny=1, cpu=2, accelerator=3) == 1
    for platform, capability, dtype in (("cpu", 0.0, "float32"), ("tpu", 0.0, "bfloat16"), ("gpu", 7.5, "float32"),
                                        ("gpu", 8.0, "bfloat16")):
        device = types.SimpleNamespace(platform=platform, compute_capability=capability)
        monkeypatch.setattr(notebook, "default_device", lambda device=device: device)
        assert notebook.fast_dtype() == dtype
    monkeypatch.setenv(notebook.VARIABLE, "huge")
    with pytest.raises(ValueError, match="MFA_JAX_NOTEBOOK_SIZE='huge': must be one of tiny, cpu, accelerator"):
        notebook.size()


# ---- the benchmark ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_times_a_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(notebook.VARIABLE, "tiny")
    name = SCRIPTS[0].stem
    monkeypatch.setattr(sys, "argv", ["bench_notebooks", "--only", name, "--json"])
    bench_notebooks.main()
    record = json.loads(capsys.readouterr().out)
    assert record["size"] == "tiny" and list(record["seconds"]) == [name] and record["seconds"][name] > 1
    assert name in str(bench_notebooks.to_table(record).columns[0]._cells)


def test_the_benchmark_tells_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"only='6': must be among {SCRIPTS[0].stem}"):
        bench_notebooks.BenchNotebooksConfig(only=("6",))
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(NotImplementedError, match="needs nbclient: pip install"):
        bench_notebooks.seconds(SCRIPTS[0].with_suffix(".ipynb"), 60)
    monkeypatch.setattr(bench_notebooks, "FOLDER", tmp_path)
    with pytest.raises(NotImplementedError, match="run this from a clone"):
        bench_notebooks.BenchNotebooksConfig(only=("6",))


def test_the_benchmark_ends_where_a_cell_raises(tmp_path: Path) -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise KeyError('broken')")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="broken"):
        bench_notebooks.seconds(tmp_path / "broken.ipynb", 60)
