"""Pure: which workers get a copy of a model, which give theirs back, and which may not have one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tether.serving_settings import ServingSettings
from tether.types import WorkerSite

__all__ = ["Candidate", "mismatch", "nowhere", "place", "surplus"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker, seen from one model that it may run."""

    address: str
    loaded: bool
    """It has the model in memory."""
    loading: bool
    able: bool
    """It may be asked to load it now."""
    models: int
    """How many models it has or is loading."""
    lent: bool = False
    """It is another lab's."""
    has_gpu: bool = False
    roomy: bool = True
    """It has room for the model without putting others out, and did not put any out lately."""
    host: str = ""
    """Of its address: what else is there is lost with it."""

    @property
    def has(self) -> bool:
        """Whether it need not be asked."""
        return self.loaded or self.loading


def place(candidates: Sequence[Candidate], copies: int) -> list[str]:
    """The workers that should load the model now, until `copies` have it.

    Those with a GPU first, of these the ones on the host with the fewest copies, of these the emptiest.

    Lent ones get what too few of the lab's can hold. The first copy comes alone: loads at the same time share the machine's cores, and all
    who wait are waiting for one of them. It may cost other models their place; another copy never does.
    """
    wanted = copies if any(candidate.loaded for candidate in candidates) else min(copies, 1)
    own = [candidate for candidate in candidates if not candidate.lent]
    lent = [candidate for candidate in candidates if candidate.lent]
    beyond = wanted - sum(candidate.has or candidate.able for candidate in own)
    is_further = any(candidate.has for candidate in candidates)
    return _best(own, wanted, is_further=is_further) + _best(lent, beyond, is_further=is_further)


def _best(candidates: Sequence[Candidate], wanted: int, *, is_further: bool) -> list[str]:
    missing = wanted - sum(candidate.has for candidate in candidates)
    if missing <= 0:
        return []
    free = [candidate for candidate in candidates if candidate.able and not candidate.has and (candidate.roomy or not is_further)]
    near = Counter(candidate.host for candidate in candidates if candidate.has)
    chosen: list[str] = []
    while free and len(chosen) < missing:
        best = min(free, key=_rank(near))
        free = [candidate for candidate in free if candidate is not best]
        near[best.host] += 1
        chosen.append(best.address)
    return chosen


def surplus(candidates: Sequence[Candidate], copies: int) -> list[str]:
    """The workers that should give the model back: of the lab's own as many as have more than `copies`, those first that would get it last.

    Lent ones keep theirs, for when all are busy, until nobody is to have it. What is being loaded is waited for.
    """
    having = [candidate for candidate in candidates if candidate.loaded and (not candidate.lent or copies == 0)]
    going: list[str] = []
    while len(having) > copies:
        near = Counter(candidate.host for candidate in having)
        worst = max(having, key=_rank(near))
        having = [candidate for candidate in having if candidate is not worst]
        going.append(worst.address)
    return going


def _rank(near: Counter[str]) -> Callable[[Candidate], tuple[object, ...]]:
    """Less is better; of what is near, `near` says how much."""
    return lambda each: (not each.roomy, not each.has_gpu, near[each.host], each.models, each.address)


def mismatch(serving: ServingSettings, gpus: int, site: WorkerSite) -> str:
    """Why a worker may not run what is served like this; "": it may."""
    if not serving.may_run_with(gpus):
        return "it has no GPU" if serving.device == "gpu" else "it has a GPU"
    if serving.region not in {None, site.region}:
        return f"it is in {site.region or 'no region'}, not in {serving.region}"
    lacking = [label for label in serving.labels if label not in site.labels]
    return f"it has no label {', '.join(lacking)}" if lacking else ""


@dataclass(frozen=True, slots=True)
class _Wish:
    """One thing that was said of where a model runs."""

    alone: ServingSettings
    words: str
    option: str
    """Of `tether worker`: starts one that meets it."""
    undo: str
    """Options of `tether serving` that take it back."""


def nowhere(model: str, serving: ServingSettings, workers: Iterable[tuple[int, WorkerSite]]) -> str:
    """Why a model can run on no worker, and what to do about it; "": it can, or there is none, which is another reason.

    `model`: `name:version`. `workers`: GPUs and site of each. Named is what none of them has; all that was said, where they have it apart.
    """
    known = list(workers)
    if not known or any(not mismatch(serving, gpus, site) for gpus, site in known):
        return ""
    wishes = _wishes(serving)
    lacking = [wish for wish in wishes if all(mismatch(wish.alone, gpus, site) for gpus, site in known)] or wishes
    words, start = ", ".join(wish.words for wish in lacking), " ".join(wish.option for wish in wishes)
    undo = " ".join([model.rpartition(":")[0], *dict.fromkeys(wish.undo for wish in lacking)])
    return f"{model} is to run {words}, and no worker does: start one (`tether worker {start}`), or `tether serving {undo}`"


def _wishes(serving: ServingSettings) -> list[_Wish]:
    wishes = []
    if serving.device != "any":
        words, gpus = ("on a GPU", 1) if serving.device == "gpu" else ("without a GPU", 0)
        wishes.append(_Wish(ServingSettings(device=serving.device), words, f"--gpus {gpus}", "--device any"))
    if serving.region is not None:
        wishes.append(_Wish(ServingSettings(region=serving.region), f"in {serving.region}", f"--region {serving.region}", "--unset region"))
    wishes += [
        _Wish(ServingSettings(labels=(label,)), f"where {label} is", f"--label {label}", "--unset labels") for label in serving.labels
    ]
    return wishes
