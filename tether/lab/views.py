"""Live mappings: every look at them asks the lab."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import Any, Generic, TypeVar

from tether.errors import NotFoundError
from tether.lab import loop
from tether.lab.objects import Model, WorkerInfo, html_table
from tether.lab.operations import Operations
from tether.lab.outsiders import PeerInfo
from tether.lab.sizes import size_text

__all__ = ["Models", "Peers", "Workers"]

V = TypeVar("V")


class _Live(Mapping[str, V], Generic[V]):
    def __init__(self, ask: Callable[[], Coroutine[Any, Any, dict[str, V]]]) -> None:
        self._ask = ask

    def _now(self) -> dict[str, V]:
        return loop.run(self._ask())

    def __getitem__(self, name: str) -> V:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def values(self) -> ValuesView[V]:
        """All of them, in one request."""
        return self._now().values()

    def items(self) -> ItemsView[str, V]:
        """All of them, in one request."""
        return self._now().items()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class Models(_Live[Model]):
    """Name → `Model`."""

    def __init__(self, operations: Operations) -> None:
        super().__init__(operations.models)
        self._model = operations.model

    def __getitem__(self, name: str) -> Model:
        """With each version's inputs and outputs. Raises: KeyError."""
        try:
            return loop.run(self._model(name))
        except NotFoundError as error:
            raise KeyError(str(error)) from error

    def __repr__(self) -> str:
        return f"<models: {', '.join(self) or 'none yet'}>"

    def _repr_html_(self) -> str:
        rows = [(model.name, str(len(model.versions)), *_newest(model)) for model in self._now().values()]
        return html_table("models", ("name", "versions", "framework", "size"), rows)


class Workers(_Live[WorkerInfo]):
    """Name → `WorkerInfo`."""

    def __init__(self, operations: Operations) -> None:
        super().__init__(operations.workers)

    def __repr__(self) -> str:
        return f"<workers: {', '.join(f'{worker.id} {worker.state}' for worker in self._now().values()) or 'none'}>"

    def _repr_html_(self) -> str:
        rows = [(worker.id, worker.state, worker.way, str(worker.gpus), ", ".join(worker.models)) for worker in self._now().values()]
        return html_table("workers", ("name", "state", "transport", "GPUs", "models"), rows)


class Peers(_Live[PeerInfo]):
    """Public key → `PeerInfo`; an address, a petname or a label finds it too. What it shows of strangers is how many there are."""

    def __init__(self, operations: Operations) -> None:
        super().__init__(operations.peers)

    def __getitem__(self, name: str) -> PeerInfo:
        """Raises: KeyError: there is none of this name, or several have the label."""
        found = self._now()
        if name in found:
            return found[name]
        named = [peer for peer in found.values() if name in {peer.address, peer.petname}]
        labelled = named or [peer for peer in found.values() if name and peer.label == name]
        if len(labelled) != 1:
            raise KeyError(name)
        return labelled[0]

    def __repr__(self) -> str:
        known, others = _parted(self._now().values())
        return f"<peers: {', '.join(f'{peer.name} {peer.state}' for peer in known) or 'none yet: lab.invite lets one in'}{others}>"

    def _repr_html_(self) -> str:
        known, others = _parted(self._now().values())
        rows = [
            (
                peer.petname or peer.label,
                peer.state,
                ", ".join(peer.scopes),
                peer.route or "",
                peer.holds,
                peer.region,
                peer.cards,
                peer.busy,
            )
            for peer in known
        ]
        return html_table(f"peers{others}", ("name", "state", "scopes", "connected", "holds", "region", "GPUs", "load"), rows)


def _parted(peers: Iterable[PeerInfo]) -> tuple[list[PeerInfo], str]:
    """Those that people know, and how many others there are, in words."""
    every = list(peers)
    known = [peer for peer in every if not peer.stranger]
    others = len(every) - len(known)
    return known, f", and {others} other{'s' if others > 1 else ''}" if others else ""


def _newest(model: Model) -> tuple[str, str]:
    if not model.versions:
        return "", ""
    return model.versions[-1].framework or "", size_text(model.versions[-1].nbytes)
