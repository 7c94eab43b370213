"""Which models of other labs this one keeps, and whom they were first had from: one small file, so that a restart goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from tether.errors import StoreError
from tether.security.files import sync_folder, written_aside

__all__ = ["EVERYTHING", "Subscription", "Subscriptions"]

EVERYTHING = "*"
"""In place of a name: all models of a publisher, those to come too."""


class Subscription(msgspec.Struct, frozen=True, order=True):
    """Models of one publisher."""

    publisher: str
    """Its key, hex."""
    models: tuple[str, ...]
    """Names as the publisher knows them, or `EVERYTHING`."""
    via: tuple[str, ...] = ()
    """Keys of labs that are asked besides the publisher and those that announce that they have them."""

    def names(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """Which of the publisher's models are meant."""
        return known if EVERYTHING in self.models else tuple(name for name in known if name in self.models)


class Subscriptions:
    """Of one lab. Any thread; each change is durable when it returns."""

    def __init__(self, path: Path) -> None:
        """Raises: StoreError: the file can't be read, or is none."""
        self._path, self._lock = path, threading.Lock()
        self._known = {each.publisher: each for each in self._read()}

    def read_again(self) -> None:
        """The file is another one than before. Raises: StoreError."""
        with self._lock:
            self._known = {each.publisher: each for each in self._read()}

    def all(self) -> tuple[Subscription, ...]:
        return tuple(sorted(self._known.values()))

    def of(self, publisher: str) -> Subscription | None:
        return self._known.get(publisher)

    def add(self, publisher: str, model: str, via: str | None = None) -> Subscription:
        """Keep this model from now on. Raises: StoreError: it can't be remembered."""
        with self._lock:
            known = self._known.get(publisher) or Subscription(publisher, ())
            models = tuple(sorted({*known.models, model}))
            peers = (*known.via, via) if via and via != publisher and via not in known.via else known.via
            new = Subscription(publisher, models, peers)
            if new != known:
                self._write(self._known | {publisher: new})
        return new

    def remove(self, publisher: str, model: str) -> None:
        """Keep it no longer up to date; what is here stays. Raises: StoreError."""
        with self._lock:
            known = self._known.get(publisher)
            if known is None or model not in known.models:
                return
            left = tuple(name for name in known.models if name != model)
            others = {key: each for key, each in self._known.items() if key != publisher}
            self._write(others | {publisher: msgspec.structs.replace(known, models=left)} if left else others)

    def _read(self) -> list[Subscription]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[Subscription])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            raise StoreError(f"{self._path} can't be read ({error}): restore it, or remove it and replicate again what you want") from error

    def _write(self, known: dict[str, Subscription]) -> None:
        try:
            with written_aside(self._path, msgspec.json.encode(sorted(known.values()))) as partial:
                partial.replace(self._path)
                sync_folder(self._path.parent)
        except OSError as error:
            raise StoreError(f"{self._path} can't be written ({error.strerror}): free space, or mend its permissions") from error
        self._known = known
