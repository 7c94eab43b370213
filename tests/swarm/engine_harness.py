"""Runs a scenario of `engine_scenarios.py`, or of another such file, in a process of its own: PythonMonkey must own its main thread.

The process must also end well: its exit status is part of what is tested.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Self

from node_packages import node_folder

HERE = Path(__file__).parent
SECONDS = 50


def run_scenario(name: str, **values: Any) -> Any:
    """What the scenario returned."""
    return Scenario(name, **values).result()


class Scenario:
    """One that runs while the test does something else."""

    script = HERE / "engine_scenarios.py"

    def __init__(self, name: str, **values: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", self.script, name, json.dumps(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def signal(self, number: int) -> None:
        """To its process."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it without a goodbye."""
        self._process.kill()
        self._process.communicate(timeout=SECONDS)

    def said(self) -> Any:
        """The next value that it said before its end."""
        line = self._process.stdout.readline()
        assert line, self._process.communicate(timeout=SECONDS)[1]
        return json.loads(line)["said"]

    def go_on(self, value: Any = None) -> None:
        """What it waits for with `told` has happened; it gets the value."""
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """What it returned; it must have ended by itself, with status 0 and nothing on standard error."""
        try:
            out, err = self._process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(self._process.communicate()[1]) from None
        assert (self._process.returncode, err) == (0, ""), err
        return json.loads(out.splitlines()[-1])["returned"]


class Testnet:
    """A DHT of five nodes in Node, with servers on it (node/testnet.js)."""

    __test__ = False

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["node", "testnet.js"], cwd=node_folder(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answers: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        began = self._answers.get(timeout=SECONDS)
        self.bootstrap: list[tuple[str, int]] = began["bootstrap"]
        self.keys: dict[str, str] = began["keys"]
        self._calls = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=SECONDS)
        self._process.stdout.close()

    def call(self, op: str, **values: Any) -> Any:
        """What Node answers; an error is raised as one."""
        self._calls += 1
        self._process.stdin.write(json.dumps({"id": self._calls, "op": op, **values}) + "\n")
        self._process.stdin.flush()
        try:
            answer = self._answers.get(timeout=SECONDS)
        except Empty:
            raise AssertionError(f"Node did not answer {op}") from None
        assert answer["id"] == self._calls
        if "error" in answer:
            raise NodeError(answer["error"], answer["code"])
        return answer["ok"]

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(json.loads(line))


class NodeError(Exception):
    """What Node's side threw: message and code."""
