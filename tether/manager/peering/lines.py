"""Workers that this lab lends and that it borrows: both made, begun and ended together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import orjson

from tether.config import DataFolder
from tether.events import LentWorker
from tether.manager.asking import Operation
from tether.manager.operations import Operations
from tether.manager.peering.borrower import Borrower
from tether.manager.peering.lender import Lender, Line
from tether.manager.peering.lendings import Lendings
from tether.manager.peering.loans import Loans
from tether.manager.peering.methods import Methods
from tether.manager.peering.own_workers import Cluster, OwnWorkers
from tether.manager.peering.pulling import Pulling
from tether.manager.peering.readying import Readying
from tether.swarm.node.node import Node

__all__ = ["Lines"]

_ANSWER = 30.0
"""Seconds for one answer about models, connecting included."""


class Lines:
    """Of one lab. Belongs to one event loop."""

    NAMES: ClassVar[tuple[str, ...]] = (*Lender.NAMES, "borrowings")

    def __init__(self, operations: Operations, data: DataFolder) -> None:
        """Raises: StoreError: what is lent can't be read."""
        self._operations = operations
        self.loans = Loans(operations.access)
        self._lendings = Lendings(data.root / "lent.json")
        self._lender = Lender(operations, self._lendings, self.loans)
        self.borrower = Borrower(operations, self.loans, data.runtime)
        self._workers: OwnWorkers | None = None
        self._readying: Readying | None = None

    @property
    def lends(self) -> bool:
        """Whether anything is lent, and can be: a reason to be on the swarm."""
        return self._workers is not None and bool(self._lendings.all())

    @property
    def borrowers(self) -> set[str]:
        """Keys of the labs that its people lend workers to."""
        return {each.publisher for each in self._lendings.all()}

    def handlers(self) -> dict[str, Operation]:
        """What people ask of it, by name."""
        return self._lender.handlers() | {"borrowings": self.borrower.borrowings}

    def join(self, cluster: Cluster | None, tell: Callable[[tuple[LentWorker, ...]], None]) -> None:
        """There are workers to lend, and an orchestrator that can use others'; None: there are none, and it can't."""
        if cluster is not None:
            self._workers = self._lender.workers = OwnWorkers(cluster)
            self.borrower.tell = tell

    def on_need(self, appear: Callable[[], Any]) -> None:
        """`appear`: awaited before the first word to another lab; this one is on the swarm then."""
        self._lender.appear = appear

    def begin(self, node: Node, methods: Methods, pulling: Pulling, changed: Callable[[], None]) -> None:
        """This lab is on the swarm. `changed`: to be called when the catalog is another one."""

        async def ask(peer: str, method: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
            answer: Mapping[str, Any] = orjson.loads(await node.request(peer, method, orjson.dumps(value), _ANSWER))
            return answer

        methods.running.lender, methods.register = self._lender, self.borrower.register
        self.borrower.begin(node.request)
        if self._workers is not None:
            self._readying = Readying(self._operations.repository, pulling, ask, self._workers, changed)
            self._lender.begin(Line(node.request, node.welcome, self._readying))

    async def retire(self, grace: float) -> None:
        """It is about to leave the swarm: no request begins any more, either way, those at other labs have `grace` seconds."""
        self._lender.retire()
        await self.borrower.retire(grace)

    async def aclose(self) -> None:
        """It leaves the swarm."""
        await asyncio.gather(self._lender.aclose(), self.borrower.aclose())
        if self._readying is not None:
            await self._readying.aclose()
            self._readying = None

    def less(self, peer: str) -> None:
        """A key may do less than before."""
        if not self._operations.access.may(peer, "register"):
            self.borrower.revoked(peer)

    def read_again(self) -> None:
        """The file is another one than before. Any thread. Raises: StoreError."""
        self._lendings.read_again()
