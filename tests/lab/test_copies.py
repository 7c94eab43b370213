"""Three labs that hold copies of one publisher's models, as its policy says; the publisher dies, and nothing is lost."""

import asyncio
import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from conftest import WEIGHTS, until, write_model

import tether
from tether.cli import tether as command
from tether.errors import ForbiddenError, UnavailableError
from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, pytest.mark.slow, needs("pythonmonkey"), pytest.mark.usefixtures("on_the_net")]
ROWS = np.ones((2, 16), np.float32)
MODELS = [f"m{number:02}" for number in range(30)]
PATIENCE = 90.0


def cli(*words):
    done = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def labs(*folders):
    """One on each; they end at the same time."""
    started = [tether.up(workers=1, data=folder) for folder in folders]
    try:
        yield started
    finally:
        with ThreadPoolExecutor() as threads:
            list(threads.map(tether.Lab.close, started))


async def publish_all(lab, folder):
    """Side by side: each is looked at in a process of its own."""

    async def publish(number, name):
        await lab.apublish(name, write_model(folder / f"{name}.onnx", number + 1.0))

    await asyncio.gather(*(publish(number, name) for number, name in enumerate(MODELS)))


def is_whole_again(lab):
    try:
        return lab.copies("alice/m00").whole == 2
    except UnavailableError:
        return False


def kill(data):
    """All of a lab at once, its supervisor first; gives its processes' end to nobody."""
    found = [each for each in psutil.process_iter(["cmdline"]) if str(data) in " ".join(each.info["cmdline"] or ())]
    for process in sorted(found, key=lambda each: "tether.lab.launch" not in each.info["cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_thirty_models_have_two_copies_each_and_again_two_after_their_publisher_died(tmp_path, monkeypatch, measured):
    monkeypatch.setenv("TETHER_SURPLUS", "0.5")  # in place of an hour
    with labs(tmp_path / "his", tmp_path / "theirs", tmp_path / "hers") as (his, theirs, hers):
        invitation = str(hers.invite(scope="replicate", uses=2))
        with pytest.raises(ForbiddenError, match="replicate"):
            his.hold(hers.address)
        for lab in (his, theirs):
            lab.hold(invitation)
            lab.name_peer(hers.address, "alice")
        asyncio.run(publish_all(hers, tmp_path))
        began = time.monotonic()
        hers.policy("m00", copies=3, pin=[his.address], budget=10**9)
        assert hers.policies()["m00"].budget == 10**9
        assert hers.policy("m00").copies == 1
        assert json.loads(cli("policy", "*", "--copies", "2", "--json", "--data", tmp_path / "hers"))["policies"].keys() == {"*"}
        until(lambda: all(hers.copies(name).whole == 2 for name in MODELS), PATIENCE)
        spread = time.monotonic() - began
        assert len(his.models) + len(theirs.models) == len(MODELS)
        assert min(len(his.models), len(theirs.models)) > 0

        hers.policy("m29", copies=3)
        until(lambda: len(his.models) + len(theirs.models) == len(MODELS) + 1)
        began = time.monotonic()
        hers.policy("m29", copies=2)
        until(lambda: len(his.models) + len(theirs.models) == len(MODELS))
        surplus = time.monotonic() - began
        until(lambda: hers.copies("m29").whole == 2)

        kill(tmp_path / "hers")
        began = time.monotonic()
        until(lambda: all(len(lab.models) == len(MODELS) for lab in (his, theirs)), PATIENCE)
        restored = time.monotonic() - began
        for lab in (his, theirs):
            for number, name in enumerate(MODELS):
                np.testing.assert_allclose(lab.infer(f"alice/{name}", ROWS), (number + 1) * ROWS @ WEIGHTS, rtol=1e-6)
        assert his.copies("alice/m00").whole == 2
        shown = cli("show", "alice/m00", "--data", tmp_path / "his")
        assert "this lab" in shown
        assert "alice" in shown  # its copy is away
        assert "whole, away" in shown
        (manager,) = [service.pid for service in his.status().services if service.role == "manager"]
        psutil.Process(manager).kill()  # the next one knows the feed and the policy from the disk
        until(lambda: is_whole_again(his), PATIENCE)
        (holding,) = json.loads(cli("hold", "--json", "--data", tmp_path / "his"))["holdings"]
        assert holding == {"publisher": his.holdings()[0].publisher, "region": "", "room": None}
        his.end_holding("alice")
        assert his.holdings() == []
        measured(
            f"30 models: two copies each {spread:.1f} s after the policy, again {restored:.1f} s after the publisher was killed; "
            f"one of three copies dropped {surplus:.1f} s after two were asked for, 0.5 s of patience included"
        )
