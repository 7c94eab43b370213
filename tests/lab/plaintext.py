"""Looks for what should not be readable anywhere: each 16 bytes of some files, at every offset of others."""

import os
from pathlib import Path

import numpy as np

WINDOW = 16
DISTINCT = 8
"""Different bytes that a window needs to be looked for: zeros, and words that every model has, say nothing."""
_STEP = 1 << 22


class Plaintext:
    """The windows of some contents."""

    def __init__(self, contents, known=b""):
        """`known`: what may be found anywhere, such as the words of a file format."""
        windows = np.unique(np.concatenate([_windows(content) for content in contents]), axis=0)
        distinct = 1 + np.count_nonzero(np.diff(np.sort(windows, axis=1), axis=1), axis=1)
        windows = windows[distinct >= DISTINCT]
        if known:
            common = {row.tobytes() for row in _windows(known)}
            windows = np.array([row for row in windows if row.tobytes() not in common])
        self.count = len(windows)
        self._whole = {row.tobytes() for row in windows}
        self._heads = np.unique(windows[:, :8].copy().view(np.uint64).ravel())

    def hits(self, data):
        """How many of the positions in `data` begin with one of them."""
        found = 0
        for start in range(0, len(data), _STEP):
            part = np.frombuffer(data[start : start + _STEP + WINDOW - 1], np.uint8)
            if len(part) < WINDOW:
                break
            heads = np.lib.stride_tricks.sliding_window_view(part, WINDOW)[:, :8].copy().view(np.uint64).ravel()
            places = np.flatnonzero(self._heads[np.searchsorted(self._heads, heads).clip(max=len(self._heads) - 1)] == heads)
            found += sum(part[place : place + WINDOW].tobytes() in self._whole for place in places)
        return found

    def found_in(self, *folders, spare=()):
        """The files below the folders that hold some of it, and how much; `spare`: folders that are not looked into."""
        hits = {}
        for path in (path for folder in folders for path in files_below(folder)):
            if any(Path(other) in path.parents for other in spare):
                continue
            if count := self.hits_in(path):
                hits[path] = count
        return hits

    def hits_in(self, path):
        """How many of the positions of a file begin with one of them; none of one that was there for a moment."""
        try:
            return self.hits(path.read_bytes())
        except FileNotFoundError:
            return 0

    def found_in_names(self, *folders):
        """Whether a window is a part of a path."""
        return [path for folder in folders for path in files_below(folder) if self.hits(os.fsencode(path))]


def files_below(folder):
    """The plain files there. Not by `rglob`, which on Python 3.11 raises for a folder that goes while it looks."""
    paths = (Path(base) / name for base, _, names in os.walk(folder) for name in names)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _windows(content):
    view = np.frombuffer(content, np.uint8)
    return np.lib.stride_tricks.sliding_window_view(view, WINDOW).copy() if len(view) >= WINDOW else np.empty((0, WINDOW), np.uint8)
