"""Row 107: a machine without memory left. Whom the kernel chooses then is read from where it reads it, and killed as it does."""

import time
from pathlib import Path

import psutil
import pytest
from chaos_lab import EATS, Client, Load, pids, together, until

pytestmark = pytest.mark.chaos


def chosen(lab):
    """Of all processes of the lab, the one that the kernel would end first (proc(5), oom_score), and what it is."""
    known = {service.pid: service.role for service in lab.status().services}
    below = {child.pid for pid in known for child in psutil.Process(pid).children(recursive=True)}
    pid = max(known.keys() | below, key=_score)
    return pid, known.get(pid, "a model's")


def has_begun_anew(lab, name, pid):
    """Whether the worker is there again, with its models: the kernel does not end the next one before there is memory in use again."""
    found = [worker for worker in lab.workers.values() if worker.id == name and worker.pid != pid]
    return any(model.startswith("echo") for worker in found for model in worker.models)


def _score(pid):
    try:
        return int(Path(f"/proc/{pid}/oom_score").read_text())
    except OSError:
        return 0


@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/oom_score").exists(), reason="the kernel tells it on Linux only")
def test_row_107_processes_that_the_kernel_ends_for_memory_cost_others_nothing(lab, chaos, measured):
    begun, ended = time.monotonic(), []
    with Load(lab, "echo") as load:
        assert together([(Client(lab), "patient", EATS)])[0][0] == 422
        for _ in range(chaos.count(50, 2)):
            assert together([(Client(lab), "patient", 0.0)])[0][0] == 200
            pid, role = chosen(lab)
            psutil.Process(pid).kill()
            until(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
            ended.append(role)
        for _ in range(chaos.count(50, 1)):
            before = pids(lab)
            victim = max(before, key=lambda name: _score(before[name]))
            psutil.Process(before[victim]).kill()
            until(lambda victim=victim, before=before: has_begun_anew(lab, victim, before[victim]))
    counts = f"{len(ended)} processes ended that the kernel would choose, all of models, and {chaos.count(50, 1)} workers; "
    counts += f"{load.answered} other requests, {len(load.flaws)} failed"
    measured(f"row 107: {counts}")
    chaos.record(107, counts, time.monotonic() - begun)
    assert set(ended) == {"a model's"}
    assert (load.flaws, load.late) == ([], 0)
