"""Pure: bytes for people; apart, because the command line needs nothing else of a lab to say how much disk is left."""

from __future__ import annotations

__all__ = ["size_text"]


def size_text(nbytes: int) -> str:
    """Bytes for people.

    >>> size_text(1023), size_text(5_400_000)
    ('1023 B', '5.1 MiB')
    """
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:  # noqa: PLR2004 (the binary unit)
            return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
