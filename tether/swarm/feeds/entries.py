"""Pure: what stands in a publisher's feed, and what a follower makes of it. All of an update counts, or none.

    models/<name>/versions/<n>   {"digest", "nbytes", "created", "tags"?}     written once; a number is never given again
    models/<name>/numbers        {"next": n}                                  numbers below were given, though their versions are gone
    models/<name>/config         any object                                   for followers; opaque here
    aliases/<name>/<alias>       {"version": n}
    peers/<key>                  any object                                   labs that hold copies, as the publisher knows them

Keys are UTF-8, values JSON, so that a Node program with hyperbee reads them as they are. Other keys are a newer Tether's and passed over.
Nothing here is believed of bytes: a version's manifest is fetched by its digest and has to be signed by the publisher.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from tether.errors import BadNameError, MalformedFeedError
from tether.types import Digest, ModelRef, model_name

__all__ = [
    "MAX_ENTRIES",
    "MAX_MODELS",
    "MAX_SAID_NBYTES",
    "MAX_VALUE_NBYTES",
    "MAX_VERSIONS",
    "Change",
    "Content",
    "FeedModel",
    "FeedVersion",
    "applied",
    "changes",
    "contradictions",
    "entries",
    "redefined",
    "renewed",
    "sayable",
    "sayable_aliases",
]

MAX_VALUE_NBYTES = 16 * 1024
MAX_MODELS = 10_000
"""Of one publisher: what a follower may be made to keep."""
MAX_VERSIONS = 100_000
MAX_ENTRIES = 2 * MAX_VERSIONS
"""Versions, aliases and all else."""
MAX_SAID_NBYTES = 64 << 20
"""Tags, aliases and configurations, all together: each may be long, and there may be many."""
_MAX_ALIASES = 256
_MAX_TAGS = 64
_MAX_PEERS = 1_000
_MAX_KEY = 256
_MAX_NBYTES = 1 << 50
_LATEST = "latest"
_WELL_KNOWN = frozenset({"prod", _LATEST})
_MAX_NUMBER = 10**9
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_HEX = re.compile(r"[0-9a-f]{64}")


class FeedVersion(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the feed says of a version."""

    digest: Digest
    """Of its manifest."""
    nbytes: int
    created: float
    tags: dict[str, str] = {}


class _Alias(msgspec.Struct, frozen=True):
    version: int


class _Numbers(msgspec.Struct, frozen=True):
    next: int


class FeedModel(msgspec.Struct, frozen=True):
    """One model of the publisher's."""

    next: int = 1
    """Numbers below it were given, also of versions that are gone."""
    versions: dict[int, FeedVersion] = {}
    aliases: dict[str, int] = {}
    config: dict[str, Any] | None = None

    @property
    def names(self) -> dict[str, int]:
        """The aliases, with `latest`, which every model in a catalog has."""
        return {_LATEST: max(self.versions), **self.aliases} if self.versions else {}


class Content(msgspec.Struct, frozen=True):
    """All that a feed says, at one of its lengths."""

    models: dict[str, FeedModel] = {}
    peers: frozenset[str] = frozenset()


class Change(msgspec.Struct, frozen=True):
    """A key that has another value than before."""

    key: str
    value: bytes | None
    """None: it is gone."""


# --- writing


def sayable(version: FeedVersion) -> FeedVersion:
    """The version, without its tags where they are more than an entry holds: a catalog's may be longer, and nobody could follow then.

    What else followers would refuse (too many models, names that they do not take), the writer finds by `applied` before it writes: one
    entry that breaks a rule would keep all followers from following, for good and without a word to the lab.
    """
    fits = len(version.tags) <= _MAX_TAGS and len(_json(version)) <= MAX_VALUE_NBYTES
    return version if fits else msgspec.structs.replace(version, tags={})


def sayable_aliases(aliases: Mapping[str, int]) -> dict[str, int]:
    """The aliases, without those that are more than followers take; the well-known ones stay."""
    ordered = sorted(aliases, key=lambda alias: (alias not in _WELL_KNOWN, alias))
    return {alias: aliases[alias] for alias in ordered[:_MAX_ALIASES]}


def entries(content: Content) -> dict[str, bytes]:
    """Keys and values of a feed that says this."""
    found: dict[str, bytes] = {f"peers/{peer}": b"{}" for peer in content.peers}
    for name, model in content.models.items():
        found |= {f"models/{name}/versions/{number}": _json(version) for number, version in model.versions.items()}
        found |= {f"aliases/{name}/{alias}": _json(_Alias(number)) for alias, number in model.aliases.items()}
        if model.next != max(model.versions, default=0) + 1:
            found[f"models/{name}/numbers"] = _json(_Numbers(model.next))
        if model.config is not None:
            found[f"models/{name}/config"] = _json(model.config)
    return found


def changes(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[Change]:
    """What to append to a feed that has `before`, in an order in which no alias is there before its version."""
    gone = [Change(key, None) for key in sorted(before.keys() - after.keys())]
    return [Change(key, value) for key, value in sorted(after.items(), reverse=True) if before.get(key) != value] + gone


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted")


# --- reading


def applied(content: Content, update: Iterable[Change]) -> tuple[Content, tuple[str, ...]]:
    """What the feed says after an update (the difference between two of its lengths), and the names of the models that changed.

    Applying an update twice changes nothing. Raises: MalformedFeedError: a rule is broken; nothing of the update counts.
    """
    drafts = _Drafts(content)
    for change in _checked(update):
        drafts.take(change)
    return drafts.finished()


def redefined(before: Content, after: Content) -> tuple[str, ...]:
    """Numbers that mean something else than before, in words."""
    return tuple(
        f"{name}:{number} was {version.digest[:12]}…, is {there[number].digest[:12]}…"
        for name, old in sorted(before.models.items())
        for there in [after.models.get(name, _BLANK).versions]
        for number, version in sorted(old.versions.items())
        if number in there and there[number].digest != version.digest
    )


def contradictions(before: Content, after: Content) -> tuple[str, ...]:
    """In words, why a feed begun anew does not go on from what was said before: it has to know of each number that was given.

    A version may be gone, as in any update. A number that was given and of which the new feed knows nothing was forgotten, and would be
    given again; one that was deleted and is back was given again.
    """
    found = list(redefined(before, after))
    for name, old in sorted(before.models.items()):
        new = after.models.get(name, _BLANK)
        if new.next < old.next:
            found.append(f"{name}: {old.next - 1} versions were published, it knows of {new.next - 1}")
        back = [number for number in sorted(new.versions) if number < old.next and number not in old.versions]
        found += [f"{name}:{number} was deleted, and is back" for number in back]
    return tuple(found)


def renewed(before: Content, after: Content) -> tuple[str, ...]:
    """Names of the models of which a feed begun anew says something else."""
    names = sorted(before.models.keys() | after.models.keys())
    return tuple(name for name in names if before.models.get(name, _BLANK) != after.models.get(name, _BLANK))


def _checked(update: Iterable[Change]) -> Sequence[Change]:
    found: list[Change] = []
    for change in update:
        if len(found) >= 2 * MAX_ENTRIES:
            raise MalformedFeedError(f"an update has more than {2 * MAX_ENTRIES} entries")
        if len(change.key) > _MAX_KEY or len(change.value or b"") > MAX_VALUE_NBYTES:
            raise _malformed(change.key, f"keys have at most {_MAX_KEY} characters, values {MAX_VALUE_NBYTES} bytes")
        found.append(change)
    return found


class _Draft:
    """A model while it is changed: the new value of each key that the update names."""

    def __init__(self) -> None:
        self.versions: dict[int, FeedVersion | None] = {}
        self.aliases: dict[str, int | None] = {}
        self.next = 1
        self.config: dict[str, Any] | None = None
        self.has_config = False

    def onto(self, name: str, old: FeedModel) -> FeedModel:
        """Raises: MalformedFeedError."""
        following, versions = _renumbered(name, old, self.versions)
        named: dict[str, int | None] = {**old.aliases, **self.aliases}
        aliases = {alias: at for alias, at in named.items() if at is not None}
        dangling = [alias for alias, at in aliases.items() if at not in versions]
        if dangling:
            raise _malformed(f"aliases/{name}/{dangling[0]}", "it points at a version that the feed does not have")
        if len(aliases) > _MAX_ALIASES:
            raise _malformed(f"aliases/{name}", f"a model has at most {_MAX_ALIASES} aliases")
        return FeedModel(max(following, self.next), versions, aliases, self.config if self.has_config else old.config)


def _renumbered(name: str, old: FeedModel, put: Mapping[int, FeedVersion | None]) -> tuple[int, dict[int, FeedVersion]]:
    """Numbers are given upwards and once: else what somebody tested as version 3 could become something else.

    Raises: MalformedFeedError.
    """
    versions = dict(old.versions)
    following = old.next
    for number, version in sorted(put.items()):
        if version is None:
            versions.pop(number, None)
            continue
        known = old.versions.get(number)
        if number < old.next and (known is None or known.digest != version.digest):
            was = "was deleted" if known is None else f"was {known.digest[:12]}…"
            raise _malformed(f"models/{name}/versions/{number}", f"version {number} {was}; a number is never given again")
        versions[number] = version
        following = max(following, number + 1)
    return following, versions


class _Drafts:
    """The models that an update touches."""

    def __init__(self, content: Content) -> None:
        self._old = content
        self._drafts: dict[str, _Draft] = {}
        self._peers: dict[str, bool] = {}

    def take(self, change: Change) -> None:
        """Raises: MalformedFeedError."""
        parts = change.key.split("/")
        match parts:
            case ["models", name, "versions", number] if _NUMBER.fullmatch(number):
                self._draft(name, change).versions[int(number)] = _version(change)
            case ["models", name, "numbers"]:
                self._draft(name, change).next = _numbers(change)
            case ["models", name, "config"]:
                draft = self._draft(name, change)
                draft.config, draft.has_config = _object(change), True
            case ["aliases", name, alias]:
                _alias(alias, change)
                found = _decoded(change, _Alias)
                self._draft(name, change).aliases[alias] = found.version if found else None
            case ["peers", key] if _HEX.fullmatch(key):
                self._peers[key] = change.value is not None
            case ["models", _, "versions", _] | ["peers", _]:
                raise _malformed(change.key, "a version has a number from 1, a peer 64 hex digits")
            case _:
                pass  # of a newer Tether

    def _draft(self, name: str, change: Change) -> _Draft:
        return self._drafts.setdefault(_name(name, change), _Draft())

    def finished(self) -> tuple[Content, tuple[str, ...]]:
        """Raises: MalformedFeedError."""
        old = self._old.models
        new = {name: draft.onto(name, old.get(name, _BLANK)) for name, draft in sorted(self._drafts.items())}
        content = Content(old | new, self._all_peers())
        _check_size(content)
        return content, tuple(name for name, model in new.items() if model != old.get(name, _BLANK))

    def _all_peers(self) -> frozenset[str]:
        gone = {key for key, is_there in self._peers.items() if not is_there}
        peers = (self._old.peers | self._peers.keys()) - gone
        if len(peers) > _MAX_PEERS:
            raise MalformedFeedError(f"a feed names at most {_MAX_PEERS} peers")
        return peers


def _check_size(content: Content) -> None:
    """Raises: MalformedFeedError: it is more than a follower may be made to keep."""
    models = content.models.values()
    versions = sum(len(model.versions) for model in models)
    said = versions + len(content.models) + sum(len(model.aliases) for model in models)
    if len(content.models) > MAX_MODELS or versions > MAX_VERSIONS or said > MAX_ENTRIES:
        raise MalformedFeedError(f"a feed has at most {MAX_MODELS} models, {MAX_VERSIONS} versions, {MAX_ENTRIES} entries: this has more")
    if sum(map(_said_nbytes, models)) > MAX_SAID_NBYTES:
        raise MalformedFeedError(f"tags, aliases and configurations of a feed have at most {MAX_SAID_NBYTES} bytes: this has more")


def _said_nbytes(model: FeedModel) -> int:
    tags = sum(len(key) + len(value) for version in model.versions.values() for key, value in version.tags.items())
    return tags + sum(map(len, model.aliases)) + (len(_json(model.config)) if model.config else 0)


_BLANK = FeedModel()


def _version(change: Change) -> FeedVersion | None:
    version: FeedVersion | None = _decoded(change, FeedVersion)
    if version is None:
        return None
    sound = _HEX.fullmatch(version.digest) and 0 <= version.nbytes <= _MAX_NBYTES and 0 <= version.created < _MAX_NBYTES
    if not sound or len(version.tags) > _MAX_TAGS:
        raise _malformed(change.key, "a version has a digest, a size, a time and few tags")
    return version


def _numbers(change: Change) -> int:
    found: _Numbers | None = _decoded(change, _Numbers)
    if found is not None and not 0 < found.next <= _MAX_NUMBER:
        raise _malformed(change.key, f"the next number is from 1 to {_MAX_NUMBER}")
    return found.next if found else 1


def _object(change: Change) -> dict[str, Any] | None:
    found: dict[str, Any] | None = _decoded(change, dict[str, Any])
    return found


def _decoded(change: Change, kind: type[Any]) -> Any:
    """None where the key is gone. Raises: MalformedFeedError."""
    if change.value is None:
        return None
    try:
        return msgspec.json.decode(change.value, type=kind, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(change.key, str(error)) from None


def _name(text: str, change: Change) -> str:
    try:
        return model_name(text)
    except BadNameError as error:
        raise _malformed(change.key, str(error)) from None


def _alias(text: str, change: Change) -> None:
    """By the catalog's own rule: other names are reserved than for models."""
    try:
        ModelRef.parse(f"model@{text}")
    except BadNameError as error:
        raise _malformed(change.key, str(error)) from None


def _malformed(key: str, why: str) -> MalformedFeedError:
    return MalformedFeedError(f"entry {key[:120]!r} of the feed breaks a rule ({why}): nothing of this update was taken")
