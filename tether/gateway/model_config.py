"""Pure: a model's configuration as the protocol's extension `model_configuration` has it: Triton's ModelConfig, as JSON (OIP §1)."""

from __future__ import annotations

from typing import Any

from tether.gateway.oip import PLATFORMS
from tether.routing.table import VersionEntry
from tether.serving_settings import DEFAULTS, MOST_ROWS, ServingSettings
from tether.types import TensorSpec

__all__ = ["model_config"]


_KINDS = {"any": "KIND_AUTO", "gpu": "KIND_GPU", "cpu": "KIND_CPU"}


def model_config(entry: VersionEntry, serving: ServingSettings) -> dict[str, Any]:
    """`GET /v2/models/{m}[/versions/{v}]/config`. What was said, in Triton's names and units; its defaults where nothing was.

    Requests for models that are not pure never run together, which Triton has no word for: they have no `dynamic_batching`.
    """
    info = entry.info
    config: dict[str, Any] = {
        "name": entry.model.name,
        "platform": PLATFORMS[info.format],
        "backend": info.framework,
        "version_policy": {"all": {}},
        "max_batch_size": _most_rows(serving) if info.batched else 0,
        "input": [_tensor(spec, batched=info.batched) for spec in info.inputs],
        "output": [_tensor(spec, batched=info.batched) for spec in info.outputs],
        "instance_group": [{"kind": _KINDS[serving.device], "count": 1}],
        "model_transaction_policy": {"decoupled": info.streams},
        "parameters": _parameters(serving),
    }
    return config | ({"dynamic_batching": _dynamic_batching(serving)} if info.batched and info.pure else {})


def _most_rows(serving: ServingSettings) -> int:
    return serving.max_batch_size or max(serving.preferred_batch_sizes, default=MOST_ROWS)


def _tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    """The batch axis is in `max_batch_size`, not in `dims`."""
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(spec.shape[1:] if batched else spec.shape)}


def _dynamic_batching(serving: ServingSettings) -> dict[str, Any]:
    levels = serving.priority_levels
    return {
        "preferred_batch_size": list(serving.preferred_batch_sizes),
        "max_queue_delay_microseconds": _microseconds(serving.max_delay),
        "preserve_ordering": False,
        "priority_levels": levels,
        "default_priority_level": serving.level(0),
        "default_queue_policy": {
            "timeout_action": "REJECT",
            "default_timeout_microseconds": _microseconds(serving.queue_timeout or 0.0),
            "allow_timeout_override": True,
            "max_queue_size": serving.max_queue_size or 0,
        },
    }


def _parameters(serving: ServingSettings) -> dict[str, Any]:
    """What Triton has no field for."""
    said: dict[str, object] = {"latency": serving.latency, "pinned": serving.pinned or None, "keep_alive": serving.keep_alive}
    said |= {"min_copies": serving.min_copies, "max_copies": serving.max_copies, "spare": serving.spare or None, "region": serving.region}
    said |= {"labels": ",".join(serving.labels) or None}
    said |= {"policy": serving.policy if serving.policy != DEFAULTS.policy else None, "hedge": serving.hedge}
    return {f"tether.{name}": {"string_value": str(value)} for name, value in said.items() if value is not None}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
