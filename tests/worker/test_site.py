"""Region and labels of a worker: from its options, from Dask's configuration, the region else from the lab's data folder."""

import dask.config
import pytest

from tether.config import DataFolder
from tether.errors import ConfigError
from tether.types import WorkerSite
from tether.worker.site import LABELS, REGION, worker_site


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "region").write_text("eu-west\n")
    return DataFolder(tmp_path)


@pytest.mark.parametrize("labels", [{"gpu": "a100", "disk": "fast"}, ["gpu=a100", "disk=fast", "gpu=a100"]])
def test_labels_come_from_the_configuration_in_either_form(folder, labels):
    with dask.config.set({LABELS: labels, REGION: "us-east"}):
        assert worker_site(folder) == WorkerSite("us-east", ("disk=fast", "gpu=a100"))


def test_the_region_is_that_of_the_lab_where_nobody_said_another(folder, tmp_path):
    assert worker_site(folder) == WorkerSite("eu-west")
    assert worker_site(DataFolder(tmp_path / "elsewhere")) == WorkerSite()
    with dask.config.set({REGION: ""}):
        assert worker_site(folder) == WorkerSite()


@pytest.mark.parametrize("said", [{LABELS: ["gpu"]}, {LABELS: "gpu=a100"}, {LABELS: ["a b=c"]}, {LABELS: [3]}, {REGION: "Mars!"}])
def test_what_is_no_label_or_region_is_refused_with_what_to_write(folder, said):
    with dask.config.set(said), pytest.raises(ConfigError):
        worker_site(folder)
