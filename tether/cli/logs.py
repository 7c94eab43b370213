"""`tether logs`: what the services wrote."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import click

from tether.cli.options import data_folder
from tether.config import DataFolder
from tether.errors import NotFoundError

__all__ = ["last_lines", "logs"]

_BLOCK: Final = 1 << 16
_LOOK: Final = 0.25
"""Seconds between looks at files that are followed."""


@click.command("logs")
@click.argument("service", required=False)
@click.option("-n", "--lines", type=click.IntRange(0), default=50, show_default=True, help="Lines of each service.")
@click.option("-f", "--follow", is_flag=True, help="Print what comes, until Ctrl-C.")
@data_folder
def logs(service: str | None, lines: int, follow: bool, data: str | None) -> None:
    """Print the logs of the lab, or of one SERVICE of it."""
    paths = _paths(DataFolder.locate(data), service)
    files = [(path, path.open("rb")) for path in paths]
    try:
        for path, file in files:
            _print(path, last_lines(file, lines), named=service is None)
        while follow:
            time.sleep(_LOOK)
            for path, file in files:
                _print(path, _new_lines(path, file), named=service is None)
    except KeyboardInterrupt:
        pass
    finally:
        for _, file in files:
            file.close()


def _paths(folder: DataFolder, service: str | None) -> list[Path]:
    found = {path.stem: path for path in sorted(folder.logs.glob("*.log"))}
    if not found:
        raise NotFoundError(f"no logs in {folder.logs}; has a lab run on this data folder?")
    if service is not None and service not in found:
        raise NotFoundError(f"no log of {service!r}; there are {', '.join(found)}")
    return list(found.values()) if service is None else [found[service]]


def _print(path: Path, lines: Iterator[bytes] | list[bytes], *, named: bool) -> None:
    for line in lines:
        text = line.decode(errors="replace").rstrip("\n")
        click.echo(f"{path.stem:14} | {text}" if named else text)


def last_lines(file: BinaryIO, count: int) -> list[bytes]:
    """The last `count` lines, read from the end: logs may be large. The file is left at its end."""
    position = file.seek(0, os.SEEK_END)
    tail = b""
    while position and tail.count(b"\n") <= count:
        step = min(_BLOCK, position)
        position -= step
        file.seek(position)
        tail = file.read(step) + tail
    file.seek(0, os.SEEK_END)
    return tail.splitlines(keepends=True)[-count:] if count else []


def _new_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Whole lines written since the last look; from the start again when the file was cut."""
    if path.stat().st_size < file.tell():
        file.seek(0)
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield line
