"""Pure: why a version is where it is and why not elsewhere, from the values that `placement.place` decides on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tether.orchestrator.placement import Candidate, mismatch, place, surplus
from tether.orchestrator.registry import KnownWorker
from tether.serving_settings import ServingSettings
from tether.types import ModelVersion

__all__ = ["Line", "Seat", "explain", "seat", "why_so_many"]

Holding = Literal["loaded", "loading", "asked", "leaving", ""]


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker, whether or not it may run the version."""

    worker: str
    """Its name."""
    candidate: Candidate
    bar: str = ""
    """Why it is no candidate at all: what was said of the model, or how the worker stands."""
    held_back: str = ""
    """Why it is not able now."""


@dataclass(frozen=True, slots=True)
class Line:
    """What is said of one worker."""

    worker: str
    holding: Holding
    """"asked", "leaving": what placement has it do now."""
    why: str


def explain(seats: Sequence[Seat], copies: int, *, gives_back: bool) -> list[Line]:
    """One line for each worker. `copies`: wanted, 0 where nobody asks; `gives_back`: whether more than that are too many."""
    candidates = [seat.candidate for seat in seats if not seat.bar]
    coming = set(place(candidates, copies))
    going = set(surplus(candidates, copies)) if gives_back else set()
    holding = {each.address: _holding(each, coming, going) for each in candidates}
    return [
        Line(seat.worker, "loaded" if seat.candidate.loaded else "", seat.bar)
        if seat.bar
        else Line(seat.worker, held := holding[seat.candidate.address], _why(seat, held, candidates, copies))
        for seat in seats
    ]


def _holding(candidate: Candidate, coming: set[str], going: set[str]) -> Holding:
    if candidate.address in coming:
        return "asked"
    if candidate.address in going:
        return "leaving"
    return "loaded" if candidate.loaded else "loading" if candidate.loading else ""


def _why(seat: Seat, holding: Holding, candidates: Sequence[Candidate], copies: int) -> str:
    match holding:
        case "asked":
            return _why_here(seat.candidate, candidates)
        case "leaving":
            return f"{_copies(copies)} will do, and the others are better placed"
        case "loaded":
            return "it has it in memory"
        case "loading":
            return "it loads it"
        case _:
            return _why_not(seat, candidates, copies)


def _why_here(candidate: Candidate, candidates: Sequence[Candidate]) -> str:
    others = [each for each in candidates if each.has]
    if candidate.lent:
        return "the lab's own workers can't hold all copies"
    if candidate.has_gpu and not all(each.has_gpu for each in candidates):
        return "it has a GPU"
    if others and candidate.host not in {each.host for each in others}:
        return "it is on another host than the others"
    return (
        "of those that can, it has the fewest models" if candidate.roomy else "somebody waits for it, and nowhere is room: others make way"
    )


def _why_not(seat: Seat, candidates: Sequence[Candidate], copies: int) -> str:
    candidate, having = seat.candidate, [each for each in candidates if each.has]
    reasons = (
        (copies == 0, "nobody asks for it"),
        (not candidate.able, seat.held_back or "it is asked later"),
        (len(having) >= copies, f"{len(having)} of {copies} copies are there"),
        (bool(having) and not candidate.roomy, "there is no room for it without putting others out, which is done for an only copy alone"),
        (not any(each.loaded for each in candidates), "the first copy comes alone, others when that answers"),
        (candidate.lent, "another lab's workers get what too few of this lab's can hold"),
        (True, "others come first: with a GPU, on another host, or with fewer models"),
    )
    return next(why for holds, why in reasons if holds)


def seat(worker: KnownWorker, model: ModelVersion, serving: ServingSettings, now: float, nbytes: int) -> Seat:
    """A worker as it is known. `nbytes`: that the version takes elsewhere."""
    bar = "" if worker.state == "running" else f"it is {worker.state}"
    if not bar and not worker.runs(model):
        bar = worker.refusal(model)
    return Seat(
        worker.id, worker.candidate(model, now, nbytes), bar or mismatch(serving, worker.gpus, worker.site), _held_back(worker, model, now)
    )


def _held_back(worker: KnownWorker, model: ModelVersion, now: float) -> str:
    if model in worker.rested:
        return "nobody had asked for it so long that it put it out; it gets it again when somebody does"
    failure = worker.failed.get(model)
    if failure is None or failure.until <= now:
        return ""
    return f"{failure.reason or 'its load was cut off'}; it is asked again in {failure.until - now:.0f} s"


def why_so_many(serving: ServingSettings, need: int, copies: int, usual: int) -> str:
    """Why so many workers are to have a version."""
    if copies == 0:
        return "nobody asks for it"
    if not serving.follows_load:
        said = serving.min_copies is not None or serving.max_copies is not None
        return f"{_copies(copies)}, as {'was said' if said else 'usual'}"
    spare = ", and a spare one" if serving.spare and copies > 1 else ""
    return f"{_copies(copies)}: load needs {need}, from {serving.copies(0, usual)} on{spare}"


def _copies(count: int) -> str:
    return "1 copy" if count == 1 else f"{count} copies"
