"""Pure: how it is said where a lab or a worker is. Loads nothing: the command line's help reads it."""

from __future__ import annotations

import re
from typing import Final

from tether.errors import BadNameError

__all__ = ["LABEL", "region_name"]

LABEL: Final = r"^[^=\s]{1,63}=[^=\s]{1,63}$"
"""Of a worker: what it has, such as `gpu=a100`."""
_REGION: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


def region_name(text: str) -> str:
    """`text`, if it names a region: where a lab is, in words that those who share models agreed on.

    Raises: BadNameError: it does not.
    """
    if not _REGION.fullmatch(text):
        raise BadNameError(f"region {text[:80]!r}: use 1–32 of a–z, 0–9, '-', starting with a letter or digit, such as eu-west")
    return text
