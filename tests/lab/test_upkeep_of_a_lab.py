"""A lab looks after its store: damage is found and mended from the published file, garbage is freed and said why."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import WEIGHTS, write_model

import tether
from tether.cli import tether as command

X = np.eye(16, dtype=np.float32)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A lab whose store is damaged, mended and cleared."""
    with tether.up(workers=1, data=tmp_path_factory.mktemp("kept"), swarm=False) as started:
        yield started


def damage(data):
    """Overwrite the beginning of the newest pack."""
    pack = max((data / "store/packs").glob("*.pack"), key=lambda path: path.stat().st_mtime)
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(64)
        file.write(b"damage" * 4)


def test_damage_is_mended_from_the_published_file(kept, tmp_path):
    path = write_model(tmp_path / "model.onnx")
    kept.publish("hurt", path)
    damage(Path(kept.status().data))
    assert not kept.verify("hurt").ok

    with_nothing = kept.repair("hurt")
    done = kept.repair("hurt", path)

    assert (bool(with_nothing), len(with_nothing.failed)) == (False, 1)
    assert (bool(done), done.repaired) == (True, with_nothing.failed)
    assert kept.verify("hurt").ok
    np.testing.assert_allclose(kept.infer("hurt", X), WEIGHTS, rtol=1e-5)


def test_garbage_is_freed_after_the_grace_and_not_before(kept, tmp_path):
    for scale in (1, 2):
        kept.publish("thrown", write_model(tmp_path / f"{scale}.onnx", scale=scale))
    kept.delete("thrown", 2)

    early, planned = kept.gc(), kept.gc(dry_run=True, grace=0)
    done, after = kept.gc(grace=0), kept.gc(dry_run=True, grace=0)

    assert (early.freed_nbytes, early.later_nbytes > 0) == (0, True)
    assert planned.freed_nbytes == done.freed_nbytes > 0
    assert after.freed_nbytes == 0
    assert planned.lines
    np.testing.assert_allclose(kept.infer("thrown", X), WEIGHTS, rtol=1e-5)


@pytest.mark.parametrize("words", [["gc", "--dry-run"], ["diff", "--help"], ["repair", "--help"], ["rm", "--help"]])
def test_the_verbs_are_there(words, lab):
    result = CliRunner().invoke(
        command, [*words, *(["--url", lab.gateway, "--api-key", lab.operations.client._api_key] if words[0] == "gc" else [])]
    )

    assert result.exit_code == 0, result.output
