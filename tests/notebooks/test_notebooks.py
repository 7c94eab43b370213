"""The notebooks run: cell by cell with the outputs they show (nbval), and as pipeline steps (papermill)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import zarr

import tether
from tether.testing.requirements import needs

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART, PIPELINE, INSIDE, TWO_LABS, FAILOVER = NOTEBOOKS
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
run_of_two_labs = pytest.param(TWO_LABS, marks=[pytest.mark.swarm, needs("pythonmonkey")])


@pytest.fixture(scope="module", autouse=True)
def digits_are_made():
    """The data set and the models that the notebooks would make at first use; the time for it is not a notebook's."""
    subprocess.run(
        [sys.executable, "-c", "import finetune, train; train.build(); train.write_examples(); finetune.build()"],
        cwd=ROOT / "datasets",
        check=True,
        timeout=200,
    )


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    """A lab of this test's own, not the user's; and a kernel of this environment, whatever kernels the user has installed."""
    monkeypatch.setenv("TETHER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")


def run_papermill(notebook: Path, folder: Path, **parameters) -> nbformat.NotebookNode:
    """As the command line does it, in a process of its own."""
    output = folder / "out.ipynb"
    values = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "--cwd", str(notebook.parent), "-k", "python3", *values]
    done = subprocess.run([*command, "--no-progress-bar"], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(output, 4)


@pytest.mark.parametrize("notebook", [QUICKSTART, PIPELINE, INSIDE, run_of_two_labs, FAILOVER], ids=lambda path: path.stem)
@pytest.mark.slow
def test_every_cell_gives_the_output_that_the_notebook_shows(notebook, tmp_path):
    # A pytest of its own, with no settings of ours: nbval runs the notebook as it stands, strictly.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = ["--nbval", "--nbval-current-env", "-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider", "-q", str(notebook)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", [QUICKSTART, INSIDE, run_of_two_labs, FAILOVER], ids=lambda path: path.stem)
def test_a_notebook_runs_as_a_pipeline_step_and_leaves_no_lab(notebook, tmp_path):
    run_papermill(notebook, tmp_path)
    with pytest.raises(tether.errors.NoLabError):
        tether.connect()


def test_the_pipeline_writes_predictions_and_their_accuracy(tmp_path):
    written = {"predictions": tmp_path / "labels.zarr", "result": tmp_path / "result.json"}
    run_papermill(PIPELINE, tmp_path, block_rows=500, **written)
    labels = zarr.open_array(written["predictions"], mode="r")
    assert (labels.shape, labels.chunks, labels.dtype.name) == ((1797,), (500,), "int64")
    report = json.loads(written["result"].read_text())
    assert (report["model"], report["rows"], report["held_out"]) == ("digits:1", 1797, 360)
    assert report["accuracy"] > 0.9


def test_the_pipeline_uses_a_lab_that_runs_and_lets_it_run(tmp_path):
    with tether.up(workers=1) as lab:
        lab.publish("mine", ROOT / "datasets/models/digits.onnx")
        run_papermill(
            PIPELINE,
            tmp_path,
            gateway=lab.gateway,
            model="mine",
            model_path="not needed: the lab has it",
            predictions=tmp_path / "labels.zarr",
            result=tmp_path / "result.json",
        )
        assert json.loads((tmp_path / "result.json").read_text())["model"] == "mine:1"
        assert list(lab.models) == ["mine"]


def test_the_pipeline_declares_its_parameters():
    declared = papermill.inspect_notebook(PIPELINE)
    assert set(declared) == {"dataset", "model", "model_path", "predictions", "result", "gateway", "block_rows"}


@each_notebook
def test_it_begins_with_what_one_will_have_at_the_end(notebook):
    first = nbformat.read(notebook, 4).cells[0]
    assert first.cell_type == "markdown"
    assert "At the end you will have" in first.source


@each_notebook
def test_only_cells_that_show_times_or_addresses_are_not_compared(notebook):
    ignored = [cell.source for cell in nbformat.read(notebook, 4).cells if "NBVAL_" in cell.source]
    assert all("NBVAL_IGNORE_OUTPUT" in source for source in ignored)
    assert all(any(call in source for call in ("tether.up(", "repeat(", ".replicate(", "axvspan(")) for source in ignored)


@each_notebook
def test_it_stands_as_it_was_run_and_shows_no_failure(notebook):
    code = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for cell in code for output in cell.outputs} <= {"execute_result", "display_data", "stream"}
    assert [output.name for cell in code for output in cell.outputs if output.output_type == "stream" and output.name == "stderr"] == []
