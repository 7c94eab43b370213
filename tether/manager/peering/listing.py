"""Pure: rows of a lab's models, as it answers them itself → what its feed would say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tether.errors import MalformedFeedError
from tether.swarm.feeds.entries import Content, FeedModel, FeedVersion, sayable
from tether.types import Digest, model_name

__all__ = ["content_of_rows"]


class _Version(msgspec.Struct):
    version: int
    digest: str
    created: float
    nbytes: int
    tags: dict[str, str] = {}


class _Model(msgspec.Struct):
    name: str
    versions: list[_Version]
    aliases: dict[str, int] = {}


def content_of_rows(rows: Iterable[Mapping[str, Any]]) -> Content:
    """Of `tether/1/models`, over a stream on which the publisher proved its key. Raises: MalformedFeedError."""
    try:
        models = [msgspec.convert(row, _Model) for row in rows]
        return Content({model_name(model.name): _feed_model(model) for model in models})
    except (msgspec.ValidationError, ValueError) as error:
        raise MalformedFeedError(
            f"the lab's answer about its models makes no sense ({error}): it may have another version of Tether"
        ) from None


def _feed_model(model: _Model) -> FeedModel:
    versions = {
        each.version: sayable(FeedVersion(Digest(each.digest), each.nbytes, each.created, each.tags))
        for each in sorted(model.versions, key=lambda each: each.version)
    }
    aliases = {alias: number for alias, number in model.aliases.items() if number in versions}
    return FeedModel(max(versions, default=0) + 1, versions, aliases)
