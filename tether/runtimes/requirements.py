"""What a custom model needs: found from its imports at publish, checked before it is loaded. Nothing is ever installed."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from tether.errors import BadModelError, MissingDependencyError

__all__ = ["check_installed", "found_requirements"]


def found_requirements(source: Path, path: Path) -> tuple[str, ...]:
    """`distribution==version` of everything that the model's source files import, the standard library and its own files excepted.

    An import inside `try:` with a handler is optional: it counts when it is installed.

    Raises: BadModelError: no Python; MissingDependencyError: something is not installed here either.
    """
    files = sorted(path.rglob("*.py")) if path.is_dir() else [source]
    own = {file.stem for file in files} | {entry.name for entry in source.parent.iterdir() if entry.is_dir() and path.is_dir()}
    needed: dict[str, bool] = {}
    for file in files:
        for name, optional in _imports(_parsed(file), optional=False):
            needed[name] = needed.get(name, True) and optional
    found = set()
    for name in sorted(needed):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in own or top == "tether":
            continue
        distribution = _distribution(name)
        if distribution is not None:
            found.add(_pinned(distribution))
        elif not needed[name]:
            raise MissingDependencyError(f"{source.name} imports {top}, which is not installed here; pip install {top}")
    return tuple(sorted(found))


def check_installed(requirements: Sequence[str]) -> None:
    """Whether this process has what the model was published with.

    Raises: MissingDependencyError: with the command that mends it; BadModelError: a line is no requirement.
    """
    lacking = [text for text in requirements if not _is_met(text)]
    if lacking:
        quoted = " ".join(f"'{text}'" for text in lacking)
        raise MissingDependencyError(f"this worker's Python lacks what the model needs; on it run: pip install {quoted}", lacking)


def _is_met(text: str) -> bool:
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise BadModelError(f"requirement {text[:200]!r} is none: {error}") from None
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def _parsed(file: Path) -> ast.AST:
    try:
        return ast.parse(file.read_bytes(), file.name)
    except (SyntaxError, ValueError) as error:
        raise BadModelError(f"{file.name} is not Python {sys.version_info.major}.{sys.version_info.minor}: {error}") from None


def _imports(node: ast.AST, *, optional: bool) -> Iterator[tuple[str, bool]]:
    """Dotted names of what is imported, and whether it may be missing."""
    match node:
        case ast.Import():
            yield from ((alias.name, optional) for alias in node.names)
        case ast.ImportFrom(module=str(module), level=0):
            yield module, optional
        case ast.Try() if node.handlers:
            for statement in node.body:
                yield from _imports(statement, optional=True)
            for part in (*node.handlers, *node.orelse, *node.finalbody):
                yield from _imports(part, optional=optional)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _imports(child, optional=optional)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Top-level module → distributions. Reads every installed package's list of files (0.2 s), so once."""
    return importlib.metadata.packages_distributions()


def _distribution(name: str) -> str | None:
    """The one that has this module; of several that share a namespace (`google`) the one with the file."""
    candidates = sorted(set(_distributions().get(name.partition(".")[0], ())))
    if len(candidates) < 2:  # noqa: PLR2004 (nothing to choose)
        return candidates[0] if candidates else None
    folder = name.replace(".", "/")
    for candidate in candidates:
        files = importlib.metadata.files(candidate) or ()
        if any(file.as_posix().startswith((f"{folder}/", f"{folder}.")) for file in files):
            return candidate
    return candidates[0]


def _pinned(distribution: str) -> str:
    """Without the local part: `torch==2.11.0` is met by the build for any card."""
    return f"{distribution}=={importlib.metadata.version(distribution).partition('+')[0]}"
