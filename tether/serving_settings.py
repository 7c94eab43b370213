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

__all__ = ["DEFAULTS", "MOST_ROWS", "ServingSettings"]

MOST_ROWS: Final = 1024
"""That run together, where nothing was said: what a larger batch gains is not seen any more."""

_Rows = Annotated[int, Meta(ge=1, le=65536)]
_Level = Annotated[int, Meta(ge=1, le=100)]


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

    def amended(self, changes: Mapping[str, Any]) -> ServingSettings:
        """These, but for what is named; None takes one back to its default.

        Raises: BadInputError: there is no such setting, or it can't have that value.
        """
        unknown = sorted(set(changes) - set(self.__struct_fields__))
        if unknown:
            raise BadInputError(f"there is no serving setting {unknown[0][:80]!r}; there are {', '.join(self.__struct_fields__)}")
        said = msgspec.to_builtins(self) | dict(changes)
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

    def may_run_with(self, gpus: int) -> bool:
        """Whether on a worker that has so many GPUs."""
        return self.device == "any" or (self.device == "gpu") == (gpus > 0)

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
