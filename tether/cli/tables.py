"""Pure but for the printing: what commands show people: aligned tables, JSON, ages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

__all__ = ["age_text", "pairs_text", "plain", "print_json", "print_table", "table_text"]

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def table_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns two blanks apart, left-aligned, no blanks at the ends of lines.

    >>> print(table_text(("name", "versions"), [("digits", 2)]))
    NAME    VERSIONS
    digits  2
    """
    cells = [[cell.upper() for cell in head], *([plain(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def plain(cell: object) -> str:
    """On one line and without control characters: names and tags come from others and go to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(cell))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    click.echo(table_text(head, rows))


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def age_text(seconds: float) -> str:
    """How long ago, in its two largest units.

    >>> age_text(5), age_text(125), age_text(7300), age_text(200_000)
    ('5s', '2m 5s', '2h 1m', '2d 7h')
    """
    whole = max(0, int(seconds))
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m {whole % _MINUTE}s"
    if whole < _DAY:
        return f"{whole // _HOUR}h {whole % _HOUR // _MINUTE}m"
    return f"{whole // _DAY}d {whole % _DAY // _HOUR}h"


def pairs_text(values: Mapping[str, Any]) -> str:
    """`a=1, b=2`, sorted."""
    return ", ".join(f"{key}={values[key]}" for key in sorted(values))
