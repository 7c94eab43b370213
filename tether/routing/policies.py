"""Pure: which of the workers that hold a model gets the next request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from tether.routing.table import Route

__all__ = ["BUSY", "least_outstanding"]

BUSY = 64
"""Open requests of this gateway from which a worker of the lab is busy: one batch runs, and at least another waits. What comes then would
wait for both, which mostly takes longer than the way to another lab."""

Outstanding = Callable[[Route], int]
"""Open requests of this gateway, of a route."""


def least_outstanding(routes: Sequence[Route], outstanding: Outstanding, avoid: Collection[Route] = ()) -> Route | None:
    """The route with the fewest open requests, the first of equals; those of `avoid` (tried already) only if there are no others.

    `routes`: those to lent workers last. One of them is chosen where no other is left, or all are busy and it has free slots.
    """
    if len(routes) < 2:  # noqa: PLR2004 (nothing to choose from; most models of a small lab)
        return routes[0] if routes else None
    usable = ([route for route in routes if route not in avoid] or routes) if avoid else routes
    if usable[-1].slots is not None:
        return _own_first(usable, outstanding)
    return min(usable, key=outstanding)


def _own_first(routes: Sequence[Route], outstanding: Outstanding) -> Route:
    own = min((route for route in routes if route.slots is None), key=outstanding, default=None)
    if own is not None and outstanding(own) < BUSY:
        return own
    freest = max((route for route in routes if route.slots is not None), key=lambda route: _free(route, outstanding))
    return freest if own is None or _free(freest, outstanding) > 0 else own


def _free(route: Route, outstanding: Outstanding) -> int:
    return (route.slots or 0) - outstanding(route)
