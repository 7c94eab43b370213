"""Pure: how a model is served, where its lab says more than the defaults: limits of batches and queues, memory. Local to one lab.

Names and meanings are those of Triton's model configuration, in our units: `max_batch_size`; of `dynamic_batching` the
`preferred_batch_size`, `max_queue_delay_microseconds` (here `max_delay`), `priority_levels`, `default_priority_level`; of its queue policy
`max_queue_size` and `default_timeout_microseconds` (`queue_timeout`); of `instance_group` the kind (`device`). `keep_alive` is Ollama's.
What Triton has in microseconds is seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from tether.errors import BadInputError
from tether.sites import LABEL, region_name

__all__ = ["DEFAULTS", "MOST_ROWS", "PolicyName", "Rollout", "ServingSettings"]

MOST_ROWS: Final = 1024
"""That run together, where nothing was said: what a larger batch gains is not seen any more."""

_Rows = Annotated[int, Meta(ge=1, le=65536)]
_Level = Annotated[int, Meta(ge=1, le=100)]
_Label = Annotated[str, Meta(pattern=LABEL)]


_Share = Annotated[float, Meta(ge=0, le=1)]
_Weight = Annotated[str, Meta(pattern=r"^[^=]{1,64}=(0\.0*[1-9][0-9]{0,3}|[1-9][0-9]{0,3}(\.[0-9]{1,3})?)$")]
PolicyName = Literal["least_outstanding", "round_robin", "weighted_round_robin", "power_of_two", "latency", "sticky", "region"]
"""Which of the workers that hold a version gets a request (`routing/policies.py`)."""


class Rollout(msgspec.Struct, frozen=True, omit_defaults=True):
    """A version that is to take the place of the one that the model's name means, step by step, if it does no worse."""

    version: Annotated[int, Meta(ge=1)]
    """The new one."""
    before: Annotated[int, Meta(ge=1)]
    """What the name meant when it began, and means until the new one is promoted."""
    begun: float
    """Unix time: tells it from another one of the same version."""
    steps: Annotated[tuple[Annotated[float, Meta(gt=0, le=1)], ...], Meta(min_length=1, max_length=100)] = (0.05, 0.25, 1.0)
    """Share of the requests that the new version answers, ascending; after the last step the name means it."""
    every: Annotated[float, Meta(ge=0, le=31_536_000)] = 30.0
    """Seconds of each step, and of the shadow."""
    requests: Annotated[int, Meta(ge=0)] = 0
    """Requests that the new version has to answer in each of them besides."""
    shadow: _Share = 0.0
    """Share of the requests that is copied to the new version before the first step; what it answers is thrown away."""
    errors: _Share = 0.01
    """Share of its requests that the new version may fail more than the old one."""
    slower: Annotated[float, Meta(gt=1)] = 2.0
    """How many times as long as the old one's its answers may take."""
    allow_nan: bool = False
    """Whether it may answer NaN to inputs that have none."""
    state: Literal["running", "promoted", "reverted", "aborted"] = "running"
    """Written when it ends: "reverted" by itself, "aborted" by somebody."""
    reason: str = ""
    """Why it was not promoted."""

    def __post_init__(self) -> None:
        """Raises: ValueError: its parts contradict each other."""
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"the steps of a rollout are ascending shares, as 0.05, 0.25, 1, not {list(self.steps)}")
        if self.version == self.before:
            raise ValueError(f"version {self.version} is what the name means already")

    def checks(self, version: int) -> bool:
        """Whether answers of this version are looked through for NaN."""
        return version == self.version and self.state == "running" and not self.allow_nan


class ServingSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one model name, all versions. Nothing has to be said: a worker learns what batches gain, and its queue is bounded by deadlines."""

    max_batch_size: _Rows | None = None
    """Rows that run together at most; one request with more still runs, alone. None: as learned."""
    max_delay: Annotated[float, Meta(ge=0, le=60)] = 0.0
    """Seconds that a request may wait for others so that a batch gets fuller."""
    preferred_batch_sizes: Annotated[tuple[_Rows, ...], Meta(max_length=32)] = ()
    """Rows, ascending: the largest that can be formed runs at once; where none can, all that waits, after `max_delay`."""
    max_queue_size: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Requests of a worker that wait; beyond it they are refused at once. With priority levels each level has as many."""
    queue_timeout: Annotated[float, Meta(gt=0, le=3600)] | None = None
    """Seconds after which a request whose batch has not begun is refused."""
    priority_levels: Annotated[int, Meta(ge=0, le=100)] = 0
    """Levels of the request parameter `priority`, 1 the most urgent: it runs before all others, however long they wait. 0: one level."""
    default_priority_level: _Level | None = None
    """Level of requests that name none, or none of these. None, or beyond the last: the last."""
    latency: Annotated[float, Meta(ge=0.0001, le=60)] | None = None
    """Seconds within which answers are wanted: what batch sizes are learned for. None: the worker's own."""
    device: Literal["any", "gpu", "cpu"] = "any"
    """Of the workers that may run it: "gpu": only those that have a GPU; "cpu": only those that have none; "any": with a GPU first."""
    pinned: bool = False
    """Whether it stays in memory, once it is there, whatever else needs room."""
    keep_alive: Annotated[float, Meta(ge=0, le=31_536_000)] | None = None
    """Seconds that it stays in memory after its last request. None: until the room is needed."""
    min_copies: Annotated[int, Meta(ge=0, le=1024)] | None = None
    """Workers that have a version at least, once it was asked for; 0: none when nobody asks. None: two, and no more than `max_copies`."""
    max_copies: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Workers that have a version at most, as load needs them. None: two, and no fewer than `min_copies`."""
    spare: bool = False
    """Whether one worker more than load needs has it: one that is lost is then missed by nobody."""
    region: str | None = None
    """Of the workers that may run it: those of this region. None: of any."""
    labels: Annotated[tuple[_Label, ...], Meta(max_length=32)] = ()
    """Of the workers that may run it: those that have all of these (`tether worker --label gpu=a100`). Taken as a mapping, too."""
    policy: PolicyName = "least_outstanding"
    """Which of the workers that have it gets a request. "sticky": the one of its `sequence_id`, or of the header `x-session-id`."""
    weights: Annotated[tuple[_Weight, ...], Meta(max_length=1024)] = ()
    """Of "weighted_round_robin": `worker-1=2`, taken as a mapping, too. Others have their number of GPUs, and 1 without any."""
    hedge: Annotated[float, Meta(ge=0.5, le=0.999)] | None = None
    """Share of the latest answers after whose time a request that has none yet is sent to a second worker, too (0.95). Pure models only,
    and one request in twenty at most. None: never."""
    rollout: Rollout | None = None
    """The latest of the model, as `lab.rollout` began it and the orchestrator ended it. None: there was none."""

    def amended(self, changes: Mapping[str, Any]) -> ServingSettings:
        """These, but for what is named; None takes one back to its default.

        Raises: BadInputError: there is no such setting, or it can't have that value.
        """
        unknown = sorted(set(changes) - set(self.__struct_fields__))
        if unknown:
            raise BadInputError(f"there is no serving setting {unknown[0][:80]!r}; there are {', '.join(self.__struct_fields__)}")
        said = msgspec.to_builtins(self) | dict(changes)
        if isinstance(labels := said.get("labels"), Mapping):
            said["labels"] = sorted(f"{name}={value}" for name, value in labels.items())
        if isinstance(weights := said.get("weights"), Mapping):
            said["weights"] = [f"{worker}={weight:g}" if isinstance(weight, int | float) else worker for worker, weight in weights.items()]
        try:
            return msgspec.convert({name: value for name, value in said.items() if value is not None}, ServingSettings)
        except msgspec.ValidationError as error:
            raise BadInputError(f"serving settings: {error}") from None

    def __post_init__(self) -> None:
        """Raises: ValueError: they contradict each other."""
        sizes = self.preferred_batch_sizes
        if list(sizes) != sorted(set(sizes)) or (self.max_batch_size is not None and sizes and sizes[-1] > self.max_batch_size):
            raise ValueError(f"preferred_batch_sizes are ascending and within max_batch_size, not {list(sizes)}")
        if self.queue_timeout is not None and self.queue_timeout <= self.max_delay:
            raise ValueError(f"queue_timeout must be over max_delay ({self.max_delay:g} s), else nothing would run")
        if self.min_copies is not None and self.max_copies is not None and self.min_copies > self.max_copies:
            raise ValueError(f"min_copies ({self.min_copies}) must not be over max_copies ({self.max_copies})")
        if self.region is not None:
            region_name(self.region)

    @property
    def rules_batches(self) -> bool:
        """Whether it says anything of the order, number or size of what runs together."""
        return bool(
            self.max_batch_size
            or self.max_delay
            or self.preferred_batch_sizes
            or self.max_queue_size
            or self.queue_timeout
            or self.priority_levels
        )

    def weight(self, worker: str) -> float | None:
        """What was said of it; None: nothing."""
        said = (each.rpartition("=") for each in self.weights)
        return next((float(weight) for name, _, weight in said if name == worker), None)

    def may_run_with(self, gpus: int) -> bool:
        """Whether on a worker that has so many GPUs."""
        return self.device == "any" or (self.device == "gpu") == (gpus > 0)

    def copies(self, need: int, usual: int) -> int:
        """Workers that are to have a version which keeps `need` of them busy. `usual`: where nothing was said."""
        low = self.min_copies if self.min_copies is not None else min(usual, self.max_copies or usual)
        high = self.max_copies or max(usual, low)
        return max(low, min(need, high) + (self.spare and need > 0))

    @property
    def is_choosy(self) -> bool:
        """Whether it says which workers may run it."""
        return self.device != "any" or self.region is not None or bool(self.labels)

    @property
    def rules_copies(self) -> bool:
        """Whether it says how many workers have it: then more are too many."""
        return self.follows_load or self.min_copies is not None

    @property
    def follows_load(self) -> bool:
        """Whether it depends on load how many workers are to have it."""
        return self.spare or self.min_copies == 0 or self.max_copies not in {None, self.min_copies}

    def level(self, priority: object) -> int:
        """The level of a request by its parameter `priority`, which is 0 or lacking where it names none; 0: there are no levels."""
        levels = self.priority_levels
        if not levels:
            return 0
        if type(priority) is int and 1 <= priority <= levels:
            return priority
        return min(self.default_priority_level or levels, levels)


DEFAULTS: Final = ServingSettings()
"""Nothing was said."""
