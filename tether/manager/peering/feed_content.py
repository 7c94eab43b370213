"""Pure: between a catalog and a feed: what a lab says of its models, and what a follower's catalog says of another lab's.

A follower's catalog names only what the follower has: a version appears in it when manifest and blobs are durable (`Repository.hold`), and
an alias moves when what it points at is there. Until then it points where it did: better a minute late than at what can't be loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from tether.store.index.mirror_tables import ModelState, VersionState
from tether.swarm.feeds.entries import Content, FeedModel, FeedVersion, sayable, sayable_aliases
from tether.types import Digest

__all__ = ["content_of", "states_of", "wanted"]

_LATEST = "latest"


def content_of(models: Iterable[ModelState], publisher: str, peers: Iterable[str] = ()) -> Content:
    """What the feed of a publisher says, as far as a catalog (`Repository.snapshot`) knows it; of oneself: what it is to say."""
    return Content({each.name: _feed_model(each) for each in models if each.publisher == publisher}, frozenset(peers))


def _feed_model(model: ModelState) -> FeedModel:
    versions = {
        each.version: sayable(FeedVersion(each.digest, each.nbytes, each.created, msgspec.json.decode(each.tags, type=dict[str, str])))
        for each in model.versions
    }
    return FeedModel(model.next, versions, sayable_aliases(model.aliases))


def wanted(content: Content, names: Iterable[str], held: Iterable[Digest]) -> list[Digest]:
    """Versions of these models that are not here, what aliases point at first."""
    here, found = set(held), dict[Digest, None]()
    models = [content.models[name] for name in names if name in content.models]
    for model in models:
        found |= dict.fromkeys(model.versions[number].digest for number in model.names.values())
    for model in models:
        found |= dict.fromkeys(model.versions[number].digest for number in sorted(model.versions, reverse=True))
    return [digest for digest in found if digest not in here]


def states_of(
    content: Content, names: Iterable[str], publisher: str, held: Mapping[Digest, bytes], before: Iterable[ModelState] = ()
) -> tuple[ModelState, ...]:
    """What the catalog is to say of these models. `held`: versions that are here, with the publisher's signatures, which were checked.

    `before`: what it says now, for aliases whose new target is not here yet.
    """
    known = {each.name: each for each in before if each.publisher == publisher}
    return tuple(_state(content.models[name], name, publisher, held, known.get(name)) for name in names if name in content.models)


def _state(model: FeedModel, name: str, publisher: str, held: Mapping[Digest, bytes], before: ModelState | None) -> ModelState:
    numbers = [number for number, version in sorted(model.versions.items()) if version.digest in held]
    versions = tuple(_version_state(number, model.versions[number], held) for number in numbers)
    old = before.aliases if before else {}
    aliases = {alias: at if at in numbers else old.get(alias) for alias, at in model.names.items()}
    there = {alias: at for alias, at in sorted(aliases.items()) if at in numbers and at is not None}
    if numbers:
        there.setdefault(_LATEST, numbers[-1])
    return ModelState(publisher, name, model.next, versions, there, _history(there, before, numbers))


def _history(aliases: Mapping[str, int], before: ModelState | None, numbers: list[int]) -> tuple[tuple[str, int], ...]:
    """Of the aliases here, as they moved here: what is not here is left out."""
    if before is None:
        return ()
    moved = [(alias, before.aliases[alias]) for alias, at in aliases.items() if before.aliases.get(alias, at) != at]
    return tuple((alias, at) for alias, at in (*before.history, *moved) if at in numbers and alias in aliases)


def _version_state(number: int, version: FeedVersion, held: Mapping[Digest, bytes]) -> VersionState:
    tags = msgspec.json.encode(version.tags, order="sorted")
    return VersionState(number, version.digest, held[version.digest], version.created, version.nbytes, tags)
