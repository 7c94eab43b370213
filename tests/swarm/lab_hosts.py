"""Whole labs on the hosts of `netns.py`: `tether up`, other commands, and a Python console beside them, in the host's namespace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from netns import Host

CONSOLE = str(Path(__file__).with_name("lab_console.py"))
SECONDS = 120
"""Of any one step: a lab begins in three seconds, beside others on a busy machine in twenty."""


class ConsoleError(Exception):
    """What was raised there: the error's name and its message."""


class LabHost:
    """Somebody at a host, with a data folder of her own. `up` begins a lab; without, there is only what commands and consoles start."""

    def __init__(self, host: Host, folder: Path, bootstrap: list[list[Any]], **environment: str) -> None:
        self.host, self.folder = host, folder
        nodes = ",".join(f"{address}:{port}" for address, port in bootstrap)
        self._environment = os.environ | {"TETHER_BOOTSTRAP": nodes, "PYTHONUNBUFFERED": "1"} | environment
        self._lab: subprocess.Popen[str] | None = None
        self._console: subprocess.Popen[str] | None = None

    def _popen(self, arguments: list[str], **options: Any) -> subprocess.Popen[str]:
        return self.host.popen([sys.executable, *arguments], env=self._environment, text=True, stdout=subprocess.PIPE, **options)

    def up(self, *options: str) -> None:
        """Begin a lab; `ready` waits for it."""
        self._lab = self._popen(["-m", "tether", "up", "--workers", "1", "--data", str(self.folder), *options], stderr=subprocess.STDOUT)

    def ready(self) -> None:
        said = []
        for line in self._lab.stdout:
            said.append(line)
            if line.startswith("End it"):
                break
        else:
            raise AssertionError("".join(said))
        self.run("lab = connect()")

    def tether(self, *words: str, seconds: float = SECONDS) -> str:
        """What a command prints."""
        command = self.host.command([sys.executable, "-m", "tether", *words, "--data", str(self.folder)])
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False, timeout=seconds)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, code: str, **values: Any) -> Any:
        """The value of an expression in the console beside the lab, where `{name!r}` stands for a value."""
        if self._console is None:
            self._console = self._popen([CONSOLE, str(self.folder)], stdin=subprocess.PIPE)
        self._console.stdin.write(json.dumps(code.format(**values)) + "\n")
        self._console.stdin.flush()
        line = self._console.stdout.readline()
        assert line, "the console ended"
        answer = json.loads(line)
        if "error" in answer:
            raise ConsoleError(answer["error"], answer["message"])
        return answer["ok"]

    def find(self, code: str, **values: Any) -> Any:
        """As `run`, again and again while the other lab is not there yet: one begins to be on the swarm when it is wanted."""
        end = time.monotonic() + SECONDS
        while True:
            try:
                return self.run(code, **values)
            except ConsoleError as error:
                if error.args[0] != "PeerNotFoundError" or time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def kill(self) -> None:
        """All of the lab at once, without a word to anybody."""
        processes = [psutil.Process(self._lab.pid)]
        processes += processes[0].children(recursive=True)
        for process in processes:
            process.kill()
        self._lab.wait(SECONDS)

    def leave(self) -> None:
        """Begin to end; what it started ends with it."""
        if self._console is not None:
            self._console.stdin.close()
        if self._lab is not None and self._lab.poll() is None:
            self._lab.send_signal(signal.SIGTERM)

    def left(self) -> None:
        for process in (self._console, self._lab):
            if process is not None:
                process.wait(SECONDS)
