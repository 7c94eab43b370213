"""A model's configuration in Triton's words."""

import msgspec
import pytest

from tether.gateway.model_config import model_config
from tether.routing.table import VersionEntry
from tether.serving_settings import DEFAULTS, MOST_ROWS, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec

INFO = ModelInfo(
    "onnx",
    "onnx",
    (TensorSpec("image", "FP32", (-1, 3, 32, 32)), TensorSpec("text", "BYTES", (-1, 1))),
    (TensorSpec("label", "INT64", (-1,)),),
    batched=True,
    pure=True,
    code=False,
)


def config(serving=DEFAULTS, **info):
    return model_config(VersionEntry(ModelVersion("net", 1, Digest("0" * 64)), msgspec.structs.replace(INFO, **info)), serving)


def test_where_nothing_was_said_it_names_what_there_is():
    told = config()
    assert (told["name"], told["platform"], told["max_batch_size"]) == ("net", "onnxruntime_onnx", MOST_ROWS)
    assert told["input"] == [
        {"name": "image", "data_type": "TYPE_FP32", "dims": [3, 32, 32]},
        {"name": "text", "data_type": "TYPE_STRING", "dims": [1]},
    ]
    assert told["output"] == [{"name": "label", "data_type": "TYPE_INT64", "dims": []}]
    assert told["dynamic_batching"]["max_queue_delay_microseconds"] == 0
    assert told["parameters"] == {}


def test_what_was_said_is_told_in_tritons_units():
    told = config(
        ServingSettings(
            max_batch_size=32,
            max_delay=0.0025,
            preferred_batch_sizes=(8, 16),
            max_queue_size=100,
            queue_timeout=1.5,
            priority_levels=3,
            default_priority_level=2,
            latency=0.05,
            pinned=True,
        )
    )
    assert told["max_batch_size"] == 32
    assert told["dynamic_batching"] == {
        "preferred_batch_size": [8, 16],
        "max_queue_delay_microseconds": 2500,
        "preserve_ordering": False,
        "priority_levels": 3,
        "default_priority_level": 2,
        "default_queue_policy": {
            "timeout_action": "REJECT",
            "default_timeout_microseconds": 1_500_000,
            "allow_timeout_override": True,
            "max_queue_size": 100,
        },
    }
    assert told["parameters"] == {"tether.latency": {"string_value": "0.05"}, "tether.pinned": {"string_value": "True"}}


@pytest.mark.parametrize(("info", "most"), [({"batched": False}, 0), ({"pure": False}, MOST_ROWS)])
def test_models_whose_requests_run_alone_have_no_batcher(info, most):
    told = config(**info)
    assert "dynamic_batching" not in told
    assert told["max_batch_size"] == most
    assert (told["input"][1]["dims"] == [-1, 1]) == (most == 0)
