"""Pure: what labs that hold copies of a publisher's models tell each other, and what one of them makes of it.

`tether/1/have`, JSON: {"publisher": key, "seen": state} -> {"state", "holds", "region", "room", "has": {model: mark}, "coming", "leaving",
"refused"}; {"state"} alone where the caller has seen that. Asked each second, it is also how labs know of each other that they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from tether.errors import RemoteError
from tether.manager.peering.replication import Copies, Plan, Policy, Site, plan
from tether.swarm.feeds.entries import MAX_MODELS, Content, FeedModel

__all__ = [
    "MAX_MEMBERS",
    "Asked",
    "Said",
    "View",
    "chosen",
    "config_of",
    "mark",
    "nbytes_of",
    "parse_said",
    "policy_of",
    "stated",
    "whole_mark",
]

MAX_MEMBERS = 64
"""Labs that hold copies of one publisher's models: each asks each other one once a second."""
_MAX_REGION = 64
_MARK_NBYTES = 16


class Asked(msgspec.Struct, frozen=True):
    """The question."""

    publisher: str
    seen: str = ""


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a lab tells of itself, for one publisher."""

    state: str = ""
    """Another one whenever anything here is other than before."""
    holds: bool = False
    """Whether it takes part; a publisher does in its own."""
    region: str = ""
    room: int | None = None
    has: dict[str, str] = {}
    """Model, as the publisher calls it → `mark` of the versions that are there."""
    coming: tuple[str, ...] = ()
    """Models that it is fetching."""
    leaving: tuple[str, ...] = ()
    """Models of which it has one copy too many, which it drops when enough others say that they keep theirs: see `leaving.py`."""
    refused: tuple[str, ...] = ()
    """Models that it can't take: code of a publisher whom it does not trust, what its sandbox refused, a full disk."""


def stated(said: Said) -> Said:
    """With the state that says what it is."""
    plain = msgspec.structs.replace(said, state="")
    return msgspec.structs.replace(plain, state=blake3(msgspec.json.encode(plain, order="deterministic")).hexdigest(_MARK_NBYTES))


def parse_said(data: bytes, before: Said | None) -> Said:
    """An answer; `before`: what the lab said last, which is what it says where only the state came. Raises: RemoteError: it is none."""
    try:
        said = msgspec.json.decode(data, type=Said)
    except msgspec.DecodeError as error:
        raise RemoteError(f"a lab's answer about its copies makes no sense ({error}): it may have another version of Tether") from None
    if before is not None and said.state == before.state:
        return before
    most = max(map(len, (said.has, said.coming, said.leaving, said.refused)))
    if most > MAX_MODELS or len(said.region) > _MAX_REGION or (said.room or 0) < 0:
        raise RemoteError(f"a lab says that it has copies of more than {MAX_MODELS} models, or is in a region of a long name: not believed")
    return said


def mark(digests: Iterable[str]) -> str:
    """Of a set of versions: two labs with the same mark have the same ones."""
    return blake3(b"".join(bytes.fromhex(digest) for digest in sorted(digests))).hexdigest(_MARK_NBYTES)


def whole_mark(model: FeedModel) -> str:
    """Of all versions that there are now."""
    return mark(version.digest for version in model.versions.values())


def nbytes_of(model: FeedModel) -> int:
    """Of one copy."""
    return sum(version.nbytes for version in model.versions.values())


def chosen(peers: Iterable[str]) -> tuple[str, ...]:
    """As many as a group has room for, the same for all who choose."""
    return tuple(sorted(peers)[:MAX_MEMBERS])


def policy_of(config: Mapping[str, object] | None) -> Policy | None:
    """What the feed says of a model; None: nothing, or nothing that this version of Tether understands."""
    if config is None or "policy" not in config:
        return None
    try:
        return msgspec.convert(config["policy"], Policy).checked()
    except (msgspec.ValidationError, ValueError):
        return None


def config_of(policy: Policy) -> dict[str, object]:
    """What the feed is to say."""
    found: dict[str, object] = {"policy": msgspec.to_builtins(policy)}
    return found


@dataclass(frozen=True, slots=True)
class View:
    """What one lab knows of a group now."""

    content: Content
    """What the publisher's feed says."""
    said: Mapping[str, Said]
    """Key → what the lab said last, this one among them, also of labs that are away."""
    here: frozenset[str]
    publisher: str = ""
    """Key of the lab whose models they are; "": not known."""

    def copies(self, name: str, model: FeedModel) -> Copies | None:
        """Who has a model; None: it has no policy."""
        policy = policy_of(model.config)
        if policy is None or not model.versions:
            return None
        whole = whole_mark(model)
        held = self._those(lambda each: each.has.get(name) == whole)
        begun = self._those(lambda each: name in each.has or name in each.coming)  # an earlier version too: it has most of what is to come
        refused = self._those(lambda each: name in each.refused)
        return Copies(name, nbytes_of(model), policy, held, begun - held, refused, frozenset({self.publisher}))

    def keepers(self, name: str, model: FeedModel) -> frozenset[str]:
        """Labs that are here, have all of a model where it is to be, and say that they keep it."""
        policy, whole = policy_of(model.config) or Policy(), whole_mark(model)

        def keeps(peer: str, each: Said) -> bool:
            is_place = not policy.regions or peer in policy.pin or each.region in policy.regions
            return is_place and each.holds and each.has.get(name) == whole and name not in each.leaving

        return frozenset(peer for peer in self.here if peer in self.said and keeps(peer, self.said[peer]))

    def plan(self) -> Plan:
        """Who is to hold what."""
        found = [self.copies(name, model) for name, model in self.content.models.items()]
        sites = [Site(peer, each.region, each.room) for peer, each in self.said.items() if each.holds and peer in self.here]
        return plan([each for each in found if each is not None], sites)

    def _those(self, condition: Callable[[Said], bool]) -> frozenset[str]:
        return frozenset(peer for peer, each in self.said.items() if each.holds and condition(each))
