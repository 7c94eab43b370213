"""What was agreed about copies: how many of this lab's models there are to be, and for which labs it holds some. One small file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from tether.errors import StoreError
from tether.manager.peering.replication import Policy
from tether.security.files import sync_folder, written_aside

__all__ = ["Agreements", "Holding"]


class Holding(msgspec.Struct, frozen=True, order=True):
    """A publisher of whose models this lab holds copies, as its policies ask."""

    publisher: str
    """Its key, hex."""
    region: str = ""
    """Where this lab is, in the words of the publisher's policies."""
    room: int | None = None
    """Bytes that it gives for these copies; None: no bound."""


class _Written(msgspec.Struct, frozen=True):
    policies: dict[str, Policy] = {}
    holdings: tuple[Holding, ...] = ()
    taken: dict[str, tuple[str, ...]] = {}
    """Publisher → models that came here as copies, and for no other reason: these alone may be dropped again."""


class Agreements:
    """Of one lab. Any thread; each change is durable when it returns."""

    EVERY = "*"
    """In place of a name: every model of this lab that has no policy of its own, those to come too."""

    def __init__(self, path: Path, region: Callable[[], str] = lambda: "") -> None:
        """`region`: where this lab is, as far as a publisher was told nothing else.

        Raises: StoreError: the file can't be read, or is none.
        """
        self._path, self._region, self._lock = path, region, threading.Lock()
        self._said = self._read()

    def read_again(self) -> None:
        """The file is another one than before. Raises: StoreError."""
        with self._lock:
            self._said = self._read()

    @property
    def policies(self) -> dict[str, Policy]:
        """By the model's name; ask `of` for one model."""
        return self._said.policies

    def of(self, model: str) -> Policy | None:
        """What is agreed about a model of this lab."""
        return self._said.policies.get(model) or self._said.policies.get(self.EVERY)

    def agree(self, model: str, policy: Policy | None) -> None:
        """From now on; None: nothing of its own is agreed any more. Raises: StoreError: it can't be remembered."""
        with self._lock:
            others = {name: each for name, each in self._said.policies.items() if name != model}
            self._write(msgspec.structs.replace(self._said, policies=others if policy is None else {**others, model: policy}))

    @property
    def holdings(self) -> tuple[Holding, ...]:
        """By publisher."""
        return tuple(each if each.region else msgspec.structs.replace(each, region=self._region()) for each in self._said.holdings)

    def hold(self, holding: Holding) -> None:
        """Hold copies for this publisher. Raises: StoreError."""
        with self._lock:
            self._write(msgspec.structs.replace(self._said, holdings=tuple(sorted((*self._others(holding.publisher), holding)))))

    def release(self, publisher: str) -> None:
        """Hold none for it any more; what is here stays. Raises: StoreError."""
        with self._lock:
            taken = {key: names for key, names in self._said.taken.items() if key != publisher}
            self._write(msgspec.structs.replace(self._said, holdings=self._others(publisher), taken=taken))

    def taken(self, publisher: str) -> frozenset[str]:
        """Models of a publisher that are here, or come, as copies and for no other reason."""
        return frozenset(self._said.taken.get(publisher, ()))

    def take(self, publisher: str, models: frozenset[str]) -> None:
        """These are it, from now on. Raises: StoreError."""
        with self._lock:
            if models != frozenset(self._said.taken.get(publisher, ())):
                self._write(msgspec.structs.replace(self._said, taken=self._said.taken | {publisher: tuple(sorted(models))}))

    def _others(self, publisher: str) -> tuple[Holding, ...]:
        return tuple(each for each in self._said.holdings if each.publisher != publisher)

    def _read(self) -> _Written:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Written)
        except FileNotFoundError:
            return _Written()
        except (OSError, msgspec.DecodeError) as error:
            raise StoreError(
                f"{self._path} can't be read ({error}): restore it, or remove it and say policies and holdings again"
            ) from error

    def _write(self, said: _Written) -> None:
        try:
            with written_aside(self._path, msgspec.json.encode(said)) as partial:
                partial.replace(self._path)
                sync_folder(self._path.parent)
        except OSError as error:
            raise StoreError(f"{self._path} can't be written ({error.strerror}): free space, or mend its permissions") from error
        self._said = said
