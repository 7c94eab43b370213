"""What to do about damage that a repair could not mend (pure), and the index of a store on which no lab runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tether.config import DataFolder
from tether.errors import NoLabError
from tether.store import Repository
from tether.store.format.layout import FILES, HIDDEN

__all__ = ["advice", "rebuild_index"]

_ELSEWHERE = "bring it from a lab that has the version, or publish the model again"


def advice(model: str, failed: tuple[str, ...], paths: Mapping[str, str], *, given: bool) -> tuple[str, ...]:
    """A line for each kind of what nobody has. `paths`: digest → zarr path of the array that needs it; `given`: whether files were."""
    return tuple(dict.fromkeys(_advised(model, failed, paths, given=given)))


def _advised(model: str, failed: tuple[str, ...], paths: Mapping[str, str], *, given: bool) -> Iterator[str]:
    for digest in failed:
        place = paths.get(digest, "")
        path = place.removeprefix(f"{FILES}/")
        if path.startswith(f"{HIDDEN}/"):
            yield (
                f"{path} is Tether's own, not one of the published files, and what a model answers need not come out the same bit for bit: "
                f"publish {model} again with its example (the same bytes mend this version, others make the next one), or bring it from a "
                "lab that has the version"
            )
        elif not place:
            yield f"{digest} is in none of the published files (the manifest, or the encrypted part of it): {_ELSEWHERE}"
        elif path == place:
            yield f"{digest} of {path} is in no file, since the version was published from a draft: {_ELSEWHERE}"
        elif not given:
            yield f"nobody has {digest} of {path}: give the published files with --from"
        else:
            yield f"{digest} of {path} is not in what was given: give the files as they were published, or {_ELSEWHERE}"


def rebuild_index(data: str | None) -> int:
    """Read from its packs again where each blob of the store in a data folder lies; gives how many packs there are.

    Raises: NoLabError: there is no store; ConflictError: a manager writes it; StoreError.
    """
    folder = DataFolder.locate(data)
    if not (folder.store / "format").exists():
        raise NoLabError(f"there is no store in {folder.root}: name the lab's data folder with --data")
    with Repository.open(folder.store, keys=folder.keys) as repository:
        return repository.rebuild_index()
