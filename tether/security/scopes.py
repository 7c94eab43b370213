"""Pure: what a key may do: the grammar of scopes, and which scope opens which method. The one place for both.

    scope   =  verb [":" models]
    verb    =  infer | models | publish | replicate | events | decrypt | register
    models  =  glob ["~" glob]       of letters as in a model's name and "*"; decrypt takes one name, register takes nothing

`infer` alone is for every model that the lab has, `infer:digits*` for its own whose name begins so. A `*` never passes the `~` between a
publisher and a name: what another lab published is opened by `infer:alice~*`, not by accident.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from tether.errors import BadScopeError

__all__ = ["ENROL", "METHODS", "VERBS", "Scope", "Scopes"]

ENROL = "enrol"
"""The one method that a key without scopes reaches."""
_MAX_SCOPES = 64
"""Of one key: a check of one method looks at all of them."""
_MAX_NAME = 129
"""Characters of a model's name as in a URL: `publisher~name`."""
_MAX_STARS = 2
"""In one half of a glob: what a match costs grows with the length of the name to that power."""
_LETTERS = "[a-z0-9._-]"
_LETTERS_OR_STAR = "[a-z0-9._*-]"
_HALF = re.compile(rf"(?:{_LETTERS}|\*){{1,64}}")
_NAME = re.compile(rf"[a-z0-9]{_LETTERS}{{0,63}}")
_ANY = rf"(?:{_LETTERS}+~)?{_LETTERS}+"


class _Models(Enum):
    """What may stand behind a verb."""

    GLOB = "a glob"
    NAME = "a name"
    NOTHING = "nothing"


VERBS: dict[str, _Models] = {
    "infer": _Models.GLOB,
    "models": _Models.GLOB,
    "publish": _Models.GLOB,
    "replicate": _Models.GLOB,
    "events": _Models.GLOB,
    "decrypt": _Models.NAME,
    "register": _Models.NOTHING,
}


class Method(NamedTuple):
    """What a method asks of its caller."""

    verbs: frozenset[str]
    """One of these."""
    whole: bool = False
    """Whether it shows every model: a scope for some of them is not enough."""


def _method(*verbs: str, whole: bool = False) -> Method:
    return Method(frozenset(verbs), whole)


METHODS: dict[str, Method] = {
    "ping": _method(*VERBS),
    "infer": _method("infer"),
    "stream": _method("infer"),
    "parts": _method("infer"),
    "unstream": _method("infer"),
    "capacity": _method("infer"),
    "models": _method("models", "infer", "replicate", "publish"),
    "manifest": _method("replicate"),
    "have": _method("replicate", whole=True),
    "blobs": _method("replicate"),
    "feed": _method("models", "replicate", whole=True),
    "heads": _method(*VERBS),
    "stage": _method("publish"),
    "publish": _method("publish"),
    "alias": _method("publish"),
    "events": _method("events"),
    "register": _method("register"),
    "envelope": _method("decrypt"),
}
"""By the names of the wire, less `tether/1/`. What is not here is nobody's."""


@dataclass(frozen=True, slots=True, order=True)
class Scope:
    """One thing that a key may do.

    >>> Scope.parse("infer:digits*").covers("digits-2"), Scope.parse("infer:digits*").covers("alice~digits")
    (True, False)
    """

    verb: str
    models: str = ""
    """A glob, or a name; "" is all."""

    @classmethod
    def parse(cls, text: str) -> Scope:
        """Raises: BadScopeError."""
        verb, colon, models = text.partition(":")
        kind = VERBS.get(verb)
        if kind is None:
            raise BadScopeError(f"unknown scope {text[:80]!r}: it begins with one of {', '.join(VERBS)}")
        if not _fits(kind, models, given=bool(colon)):
            raise BadScopeError(f"scope {text[:80]!r}: {_ADVICE[kind].format(verb=verb)}")
        return cls(verb, models)

    def covers(self, model: str) -> bool:
        """Whether it is for the model of this name (as in a URL)."""
        return len(model) <= _MAX_NAME and re.fullmatch(self.pattern, model) is not None

    def includes(self, other: Scope) -> bool:
        """Whether all that the other opens is opened by this one. Of two odd globs that may be said to be not so though it is."""
        if self.verb != other.verb or not (self.models and other.models):
            return self.verb == other.verb and not self.models
        return re.fullmatch(self.pattern.replace(_LETTERS, _LETTERS_OR_STAR), other.models) is not None

    def meets(self, other: Scope) -> bool:
        """Whether there could be something that both open."""
        if self.verb != other.verb or not (self.models and other.models):
            return self.verb == other.verb
        return _meet(self.models, other.models)

    @property
    def pattern(self) -> str:
        """Of the names that it is for."""
        return re.escape(self.models).replace(r"\*", f"{_LETTERS}*") if self.models else _ANY

    def __str__(self) -> str:
        return f"{self.verb}:{self.models}" if self.models else self.verb


_ADVICE = {
    _Models.GLOB: "behind the colon stands a model's name, with up to two `*`: {verb}:digits*, {verb}:alice~*; without it, it is for all",
    _Models.NAME: "give the name of one model: {verb}:digits",
    _Models.NOTHING: "nothing stands behind {verb}",
}


def _fits(kind: _Models, models: str, *, given: bool) -> bool:
    match kind:
        case _Models.GLOB:
            return not given or _is_glob(models)
        case _Models.NAME:
            return _NAME.fullmatch(models) is not None
        case _Models.NOTHING:
            return not given


def _meet(one: str, other: str) -> bool:
    """Whether a name fits both globs: all pairs of places in them that the same beginning of a name can lead to."""
    seen, todo = set(), [(0, 0)]
    while todo:
        here = i, j = todo.pop()
        if here == (len(one), len(other)):
            return True
        if here in seen:
            continue
        seen.add(here)
        a, b = one[i : i + 1], other[j : j + 1]
        if a == "*":
            todo.append((i + 1, j))
        if b == "*":
            todo.append((i, j + 1))
        if a and b and (a == b or (a == "*" and b != "~") or (b == "*" and a != "~")):
            todo.append((i + (a != "*"), j + (b != "*")))
    return False


def _is_glob(text: str) -> bool:
    halves = text.split("~")
    return len(halves) <= 2 and all(_HALF.fullmatch(half) and half.count("*") <= _MAX_STARS for half in halves)  # noqa: PLR2004 (publisher, name)


class _Rule(NamedTuple):
    """What one method is to one key."""

    some: bool
    """For at least one model, or of those that have no model."""
    models: re.Pattern[str]


class Scopes:
    """All that one key may do. Immutable; a check takes a microsecond."""

    __slots__ = ("_rules", "_scopes")

    def __init__(self, scopes: Iterable[Scope] = ()) -> None:
        """Raises: BadScopeError: they are too many."""
        self._scopes = tuple(sorted(set(scopes)))
        self._rules: dict[str, _Rule] = {}
        if len(self._scopes) > _MAX_SCOPES:
            raise BadScopeError(f"{len(self._scopes)} scopes for one key; at most {_MAX_SCOPES} are allowed: use a `*`")

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Scopes:
        """Raises: BadScopeError: one is none, or they are too many."""
        return cls(Scope.parse(text) for text in texts)

    def may(self, method: str, model: str | None = None) -> bool:
        """Whether they open the method for a model, by its name as the catalog resolved it; None: for any model at all."""
        rule = self._rules.get(method) or self._rule(method)
        if model is None or not rule.some:
            return rule.some
        return len(model) <= _MAX_NAME and rule.models.fullmatch(model) is not None

    def _rule(self, method: str) -> _Rule:
        asked = METHODS.get(method)
        if asked is None:
            return _CLOSED  # not kept: there is no end of names that a peer may invent
        opening = [scope for scope in self._scopes if scope.verb in asked.verbs and not (asked.whole and scope.models)]
        pattern = re.compile("|".join(scope.pattern for scope in opening))
        rule = self._rules[method] = _Rule(bool(opening), pattern)
        return rule

    def with_(self, others: Iterable[Scope]) -> Scopes:
        return Scopes((*self._scopes, *others))

    def without(self, others: Iterable[Scope]) -> Scopes:
        gone = set(others)
        return Scopes(scope for scope in self._scopes if scope not in gone)

    def still_open(self, gone: Iterable[Scope]) -> Scopes:
        """Those that would be left and still open some of what is to go: so that it does not seem closed and is not.

        A narrower one beside a wide one that goes (`infer:digits` beside `infer`) is no such: it was given apart.
        """
        taken = set(gone)
        return Scopes(
            each
            for each in self._scopes
            if each not in taken and any(each.meets(one) and not (one in self._scopes and one.includes(each)) for one in taken)
        )

    def texts(self) -> list[str]:
        return [str(scope) for scope in self._scopes]

    def __iter__(self) -> Iterator[Scope]:
        return iter(self._scopes)

    def __len__(self) -> int:
        return len(self._scopes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scopes) and self._scopes == other._scopes

    def __hash__(self) -> int:
        return hash(self._scopes)

    def __repr__(self) -> str:
        return f"Scopes({', '.join(self.texts())})"


_CLOSED = _Rule(some=False, models=re.compile("(?!)"))
