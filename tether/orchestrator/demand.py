"""Pure: which versions are asked for, and why some of them are in no memory."""

from __future__ import annotations

from collections.abc import Iterable

from tether.types import ModelVersion

__all__ = ["Demand"]


class Demand:
    """Of published versions only."""

    def __init__(self) -> None:
        self.wanted: set[ModelVersion] = set()
        self.reasons: dict[ModelVersion, str] = {}
        """What a worker of the lab failed to load last, and why."""
        self.short: dict[ModelVersion, str] = {}
        """What no room was found for when it was asked for last, and why."""
        self.lacking: set[ModelVersion] = set()
        """What is wanted and has fewer copies than it is to have: a worker that gets room may be for one of these."""

    def answered(self, model: ModelVersion) -> None:
        """It was loaded: nothing that was said before counts."""
        self.reasons.pop(model, None)
        self.short.pop(model, None)

    def drop(self, models: Iterable[ModelVersion]) -> None:
        """They are published no more."""
        for model in models:
            self.wanted.discard(model)
            self.lacking.discard(model)
            self.answered(model)
