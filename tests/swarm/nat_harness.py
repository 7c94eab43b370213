"""Programs on the hosts of `netns.py`, told what to do: `nat_peer.py`, or the same in Node."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from netns import Host, Internet, Nat
from node_packages import node_folder

PYTHON_PEER = [sys.executable, "-W", "error", str(Path(__file__).with_name("nat_peer.py"))]
NODE_PEER = ["node", "nat_peer.js"]
SECONDS = 60
OF_A_NODE = {"start", "listen", "begin_relay", "address", "probe", "status", "connect", "hold", "gather"}


class PeerError(Exception):
    """What the other side's program says: the error's name, its message and its code."""


class Peer:
    """A program on a host. Calls may overlap: `begin` gives what `end` waits for; any other name is a call and its answer at once."""

    def __init__(self, host: Host, *, in_node: bool = False) -> None:
        self.in_node = in_node
        self.name = uuid.uuid4().hex
        """Of its node, if it has one only: decides its key."""
        self.process = host.popen(
            NODE_PEER if in_node else PYTHON_PEER,
            cwd=node_folder() if in_node else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: dict[int, Queue[dict[str, Any]]] = {}
        self._calls = 0
        threading.Thread(target=self._read, daemon=True).start()

    def __getattr__(self, op: str) -> Any:
        return lambda **values: self.end(self.begin(op, **values))

    def begin(self, op: str, **values: Any) -> int:
        if op in OF_A_NODE:
            values = {"name": self.name, **values}
        self._calls += 1
        self._answers[self._calls] = Queue()
        self.process.stdin.write(json.dumps({"id": self._calls, "op": op, **values}) + "\n")
        self.process.stdin.flush()
        return self._calls

    def end(self, call: int, seconds: float = SECONDS) -> Any:
        try:
            answer = self._answers[call].get(timeout=seconds)
        except Empty:
            raise AssertionError(f"no answer in {seconds} s") from None
        if "error" in answer:
            raise PeerError(answer["error"], answer["message"], answer["code"])
        return answer["ok"]

    def _read(self) -> None:
        for line in self.process.stdout:
            answer = json.loads(line)
            self._answers[answer["id"]].put(answer)


class Peers:
    """Peers of one internet that tests use one after the other, under new keys: PythonMonkey's import is most of what a peer costs."""

    def __init__(self, internet: Internet) -> None:
        self._internet = internet
        self._idle: dict[Nat | None, list[Peer]] = {}
        self._taken: list[tuple[Nat | None, Peer]] = []

    def behind(self, nat: Nat | None, *, in_node: bool = False) -> Peer:
        """One behind a router of its own, or, without NAT, in public."""
        idle = self._idle.setdefault(nat, [])
        if idle and not in_node:
            peer = idle.pop()
            peer.name = uuid.uuid4().hex
        else:
            peer = Peer(self._internet.host() if nat is None else self._internet.router(nat).host(), in_node=in_node)
        self._taken.append((nat, peer))
        return peer

    def public(self, *, in_node: bool = False) -> Peer:
        return self.behind(None, in_node=in_node)

    def give_back(self) -> None:
        """All of them: a test is over."""
        forgetting = [(nat, peer, peer.begin("forget")) for nat, peer in self._taken if not peer.in_node]
        for _, peer in self._taken:
            if peer.in_node:
                peer.process.kill()
        self._taken = []
        for nat, peer, call in forgetting:
            peer.end(call)
            self._idle[nat].append(peer)


def dht(host: Host) -> list[list[Any]]:
    """A DHT of a node for each address of the host; where to begin with it."""
    peer, bootstrap = Peer(host), []
    for address in (host.address, *host.others):
        peer.start(name=address, bootstrap=bootstrap, host=address, ephemeral=False, firewalled=False)
        bootstrap = bootstrap or [[address, peer.address(name=address)[1]]]
    return bootstrap


def introduce(bootstrap: list[list[Any]], caller: Peer, called: Peer, relay: str | None = None) -> str:
    """Both take part, and one may be called; its key. At once, since most of it is importing PythonMonkey."""
    through = {} if relay is None else {"relay_through": relay}
    calls = [(side, side.begin("start", bootstrap=bootstrap, **more)) for side, more in ((caller, {}), (called, through))]
    key = [side.end(call) for side, call in calls][1]
    called.listen()
    return key
