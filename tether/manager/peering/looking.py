"""Looks at another lab's version before it becomes one here, as a publish looks at a draft: whoever signed it, it may be hostile."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tether.errors import (
    BadModelError,
    ClusterKeyMissingError,
    LockedModelError,
    NoModelFileError,
    UnknownFrameworkError,
    UntrustedCodeError,
)
from tether.manager.publishing import EXAMPLE
from tether.runtimes import DATA_FORMATS
from tether.runtimes.inspecting import inspect_in_sandbox, limits_for
from tether.security.volatile import VolatileFolder
from tether.store import Manifest, Repository
from tether.store.packing.disk import disk_errors
from tether.store.replicas.cache import CacheBudget, default_nbytes
from tether.types import Digest

__all__ = ["InThread", "check_trust", "is_data", "look"]

InThread = Callable[..., Awaitable[Any]]
"""`await in_thread(call, *arguments)`: one who is cancelled leaves when the thread is done."""


def is_data(manifest: Manifest) -> bool:
    """Whether it says that it is in a format that can run nothing: what it says of itself in two ways has to agree."""
    return manifest.info.format in DATA_FORMATS and not manifest.info.code


def check_trust(repository: Repository, name: str, publisher: str, manifest: Manifest) -> None:
    """Raises: UntrustedCodeError: it can run code, and its publisher is not trusted for that."""
    if not is_data(manifest) and not repository.trusted(publisher, "code"):
        raise UntrustedCodeError(
            f"{name} is in a format that can run code ({manifest.info.format}), its publisher is not trusted for code; "
            f"if you know whose key that is: tether trust {publisher} --code"
        )


async def look(repository: Repository, digest: Digest, public: Manifest, workspace: Path, in_thread: InThread) -> None:
    """Open the files of a version, which are all here, in the sandbox, and run its example there.

    Of a good one the files stay where workers look for them, as long as there is room for checkouts: the first that loads it need not write
    them once more, only verify them, as always. One of code formats is not looked at: its publisher is trusted. An encrypted one that this
    lab can't open is not, either; one that it can is looked at in memory, and nothing of it stays. `workspace`: a folder for what is in
    between.

    Raises: BadModelError and its kin: it is not what it says, or must not be loaded; NoSpaceError, StoreError, ConfigError.
    """
    if not is_data(public):
        return
    try:
        manifest = await in_thread(repository.manifest, digest)
    except (LockedModelError, ClusterKeyMissingError):
        return
    with ExitStack() as pinned:
        await in_thread(_pin, repository, digest, pinned)
        try:
            folder = await in_thread(repository.checkout, digest)
            with _scratch(workspace, in_memory=public.encryption is not None) as scratch:
                example = await in_thread(_copied_example, folder, scratch)
                await _inspect(folder, manifest, example, scratch)
        except BaseException:
            await in_thread(repository.discard, digest)
            raise
        if public.encryption is not None:
            await in_thread(repository.discard, digest)
    await in_thread(_make_room, repository)


def _budget(repository: Repository) -> CacheBudget:
    """What checkouts may have: never more than is free."""
    nbytes = min(default_nbytes(repository.root), shutil.disk_usage(repository.root).free)
    return CacheBudget(repository, nbytes, checkouts_only=True)


def _pin(repository: Repository, digest: Digest, pinned: ExitStack) -> None:
    """Keep a worker, or another look, from making room by what is looked at."""
    with disk_errors(repository.root):
        pinned.enter_context(_budget(repository).pin(digest))


def _make_room(repository: Repository) -> None:
    """Let the longest unused checkouts go, as far as need be; the one that was just made goes last."""
    with disk_errors(repository.root):
        _budget(repository).make_room()


def _copied_example(folder: Path, scratch: Path) -> Path | None:
    """The version's example, if it has one, where what the model answers to it can be written beside it."""
    if not (folder / EXAMPLE).is_file():
        return None
    return Path(shutil.copyfile(folder / EXAMPLE, scratch / Path(EXAMPLE).name))


async def _inspect(folder: Path, manifest: Manifest, example: Path | None, scratch: Path) -> None:
    entry = folder / manifest.entry
    try:
        limits = replace(limits_for(entry), scratch=str(scratch))
        found = await inspect_in_sandbox(entry, manifest.framework, example=example, limits=limits)
    except (UnknownFrameworkError, NoModelFileError) as error:
        raise BadModelError(f"its manifest says that it is {manifest.info.format}: {error}") from error
    if found.info.format != manifest.info.format:
        raise BadModelError(f"its manifest says that it is {manifest.info.format}, its files say {found.info.format}")


@contextmanager
def _scratch(workspace: Path, *, in_memory: bool) -> Iterator[Path]:
    """A folder that is gone afterwards; in memory for what no disk may see."""
    if in_memory:
        folder = VolatileFolder.create("pull")
        try:
            with folder.errors():
                yield folder.path
        finally:
            folder.close()
        return
    with disk_errors(workspace):
        workspace.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(dir=workspace))
    try:
        with disk_errors(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
