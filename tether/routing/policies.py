"""Pure: which of the workers that hold a model gets the next request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from tether.routing.table import Route

__all__ = ["least_outstanding"]


def least_outstanding(routes: Sequence[Route], outstanding: Callable[[Route], int], avoid: Collection[Route] = ()) -> Route | None:
    """The route with the fewest open requests, the first of equals; those of `avoid` (tried already) only if there are no others."""
    usable = [route for route in routes if route not in avoid] if avoid else routes
    return min(usable or routes, key=outstanding, default=None)
