"""The process of a manager without a lab: for notebooks and programs that only connect to labs elsewhere. It ends when they have."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from tether.config import DataFolder
from tether.errors import ConflictError, LabRunningError
from tether.manager.asking import asked_alone
from tether.manager.entrance import Standing, entrance
from tether.manager.locks import TAKEN, is_locked
from tether.manager.operations import Operations
from tether.manager.settings import ManagerSettings
from tether.security.identity import Identity
from tether.security.volatile import sweep
from tether.store import Repository
from tether.telemetry.service import Life, run_service

__all__ = ["run"]


def run(settings: ManagerSettings) -> None:
    """Serve until nobody is connected for `settings.idle` seconds, a lab wants the data folder, or the process is told to end."""
    try:
        run_service(functools.partial(_serve, settings))
    except LabRunningError as error:
        click.echo(f"error: {error} [{error.code}]", err=True)
        raise SystemExit(TAKEN) from None


async def _serve(settings: ManagerSettings, life: Life) -> None:
    folder = settings.data
    await asyncio.to_thread(sweep)  # of what a killed manager left in memory
    identity = Identity.load_or_create(folder.identity)
    with _taken(folder, identity) as repository:
        operations = Operations(repository, identity, folder.run / "publishing")
        try:
            asking = await asyncio.to_thread(asked_alone, operations)
            async with entrance(settings, operations, asking, Standing(end=life.end), alone=True) as door:
                life.ready(pid=os.getpid())
                await _first(life, door.deserted(settings.idle))
        finally:
            operations.close()
            with suppress(OSError):  # others' sockets are in it, or it is gone
                folder.runtime.rmdir()


@contextmanager
def _taken(folder: DataFolder, identity: Identity) -> Iterator[Repository]:
    """The store, with the writer's lock, on a folder on which no lab is.

    A lab's supervisor takes the lab's lock first and then waits for the writer's; this is the other way round, so at least one of the
    two sees the other, and it is always this one that goes. Raises: LabRunningError.
    """
    try:
        opened = Repository.open(folder.store, own=identity.public)
    except ConflictError as error:
        raise LabRunningError(str(error)) from error
    with opened as repository:
        if is_locked(folder.lab_lock):
            raise LabRunningError(f"a lab runs on {folder.root}, or is about to: its manager answers")
        folder.create()  # once more: a lab that just ended removes the folder of sockets, and no other can any more
        yield repository


async def _first(life: Life, deserted: Coroutine[Any, Any, None]) -> None:
    """Wait until one of both ends."""
    tasks = [asyncio.ensure_future(life.ended()), asyncio.ensure_future(deserted)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
