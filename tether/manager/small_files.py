"""The small files beside the store that each manager of a lab is to have: what it keeps of others, what it agreed, what feeds said last.

They are replaced whole by those who own them; here they are bytes. What the writer does not have stays where a follower has it: a lab that
knows less is no reason to forget.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tether.errors import StoreError
from tether.security.files import sync_folder, written_aside

__all__ = ["read", "write"]

_ALONE: Final = ("region", "subscriptions.json", "copies.json", "lent.json", "feeds/own/own.json")
_STATES: Final = "feeds/states"
"""What is believed of others' feeds, a file a publisher: without it the next writer would take an older one for the first that it sees."""
_STATE: Final = re.compile(rf"{_STATES}/[0-9a-f]{{64}}\.json")


def read(root: Path) -> dict[str, bytes]:
    """Those of a data folder that are there, by their paths in it. Raises: StoreError: one can't be read."""
    names = [*_ALONE, *(f"{_STATES}/{path.name}" for path in (root / _STATES).glob("*.json"))]
    found = {}
    for name in filter(_is_one, names):
        try:
            found[name] = (root / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StoreError(f"{root / name} can't be read ({error.strerror}): mend the folder's permissions") from error
    return found


def write(root: Path, files: Mapping[str, bytes]) -> None:
    """Have the same here, each whole or not at all; durable when it returns. Raises: StoreError."""
    here = read(root)
    for name, data in files.items():
        if _is_one(name) and here.get(name) != data:
            _replace(root / name, data)


def _is_one(name: str) -> bool:
    return name in _ALONE or _STATE.fullmatch(name) is not None


def _replace(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with written_aside(path, data) as partial:
            partial.rename(path)
            sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path} can't be written ({error.strerror}): free space, or mend its permissions") from error
