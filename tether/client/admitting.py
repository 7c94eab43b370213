"""Whom a lab lets in from outside, over HTTP: invitations, peers and their scopes, keys of encrypted models."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Final, Protocol
from urllib.parse import quote

from tether.client.answers import rows
from tether.errors import BadAddressError
from tether.security.addresses import SCHEME

__all__ = ["Admitting", "Ask"]

_V1: Final = "/tether/v1"


class Ask(Protocol):
    """One exchange of JSON with a gateway."""

    def __call__(
        self, method: str, path: str, value: dict[str, Any] | None = None, *, repeatable: bool = True
    ) -> Awaitable[dict[str, Any]]:
        """Raises: the error of the tree that the gateway names."""
        ...


class Admitting:
    """Of one gateway's lab. `peer` is a key, an address or a petname."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def address(self) -> dict[str, Any]:
        return await self._ask("GET", f"{_V1}/address")

    async def invite(self, scopes: Sequence[str], expires: str | float, uses: int, label: str) -> dict[str, Any]:
        """Not repeated by itself: whose answer was lost would leave an invitation behind that nobody knows."""
        body = {"scopes": list(scopes), "expires": expires, "uses": uses, "label": label}
        return await self._ask("POST", f"{_V1}/invitations", body, repeatable=False)

    async def invitations(self) -> list[dict[str, Any]]:
        return rows(await self._ask("GET", f"{_V1}/invitations"), "invitations")

    async def revoke_invitation(self, invitation: str) -> dict[str, Any]:
        return await self._ask("DELETE", f"{_V1}/invitations/{quote(invitation, safe='')}")

    async def peers(self) -> list[dict[str, Any]]:
        return rows(await self._ask("GET", f"{_V1}/peers"), "peers")

    async def allow(self, peer: str, scopes: Sequence[str], label: str | None = None) -> dict[str, Any]:
        return await self._ask("PUT", _peer_path(peer), {"scopes": list(scopes), "label": label})

    async def disallow(self, peer: str, scopes: Sequence[str] | None) -> dict[str, Any]:
        """None: everything. Not repeated by itself: the second answer would not say what the first one took."""
        body = {"scopes": None if scopes is None else list(scopes)}
        return await self._ask("POST", f"{_peer_path(peer)}/disallow", body, repeatable=False)

    async def ban(self, peer: str, reason: str) -> dict[str, Any]:
        return await self._ask("PUT", f"{_peer_path(peer)}/ban", {"reason": reason})

    async def unban(self, peer: str) -> dict[str, Any]:
        return await self._ask("DELETE", f"{_peer_path(peer)}/ban")

    async def name_peer(self, peer: str, petname: str) -> dict[str, Any]:
        return await self._ask("PUT", f"{_peer_path(peer)}/petname", {"petname": petname})

    async def audit(self, most: int) -> list[dict[str, Any]]:
        return rows(await self._ask("GET", f"{_V1}/audit?most={most}"), "lines")

    async def accept(self, envelope: str) -> dict[str, Any]:
        return await self._ask("POST", f"{_V1}/envelopes", {"envelope": envelope})

    async def rotate(self) -> dict[str, Any]:
        return await self._ask("POST", f"{_V1}/cluster-key/rotate", {}, repeatable=False)


def _peer_path(peer: str) -> str:
    """Raises: BadAddressError: it would be another path."""
    named = peer.strip().removeprefix(SCHEME).rstrip("/")
    if not named or "/" in named:
        raise BadAddressError(f"{peer[:80]!r} names no lab: give its key, its address as `tether status` shows it there, or a petname")
    return f"{_V1}/peers/{quote(named, safe='')}"
