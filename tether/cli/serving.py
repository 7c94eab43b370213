"""`tether serving`: how a model is served, where its lab says more than the defaults."""

from __future__ import annotations

from typing import Any, get_args

import click
import msgspec

from tether.cli.options import Target, as_json, at_lab, run
from tether.cli.tables import print_json, print_table
from tether.serving_settings import PolicyName, ServingSettings

__all__ = ["serving"]

_NAMES = [field.replace("_", "-") for field in ServingSettings.__struct_fields__ if field != "rollout"]


@click.command("serving")
@click.argument("name")
@click.option("--max-batch-size", type=int, metavar="ROWS", help="That run together at most.")
@click.option("--max-delay", type=float, metavar="SECONDS", help="That a request may wait so that a batch gets fuller.")
@click.option("--preferred-batch-sizes", metavar="4,8,16", help="Rows: the largest that can be formed runs at once.")
@click.option("--max-queue-size", type=int, metavar="REQUESTS", help="That wait at a worker at most; others are refused at once.")
@click.option("--queue-timeout", type=float, metavar="SECONDS", help="After which a request that still waits is refused.")
@click.option("--priority-levels", type=int, help="Of the request parameter `priority`; 1 is the most urgent.")
@click.option("--default-priority-level", type=int, help="Of requests that name none  [default: the last].")
@click.option("--latency", type=float, metavar="SECONDS", help="Within which answers are wanted: batch sizes are learned for it.")
@click.option("--device", type=click.Choice(["any", "gpu", "cpu"]), help="Of the workers that may run it.")
@click.option("--pinned/--no-pinned", default=None, help="Keep it in memory, whatever else needs room.")
@click.option("--keep-alive", type=float, metavar="SECONDS", help="That it stays in memory after its last request.")
@click.option("--min-copies", type=int, metavar="WORKERS", help="That have it at least, once it was asked for; 0: none when nobody asks.")
@click.option("--max-copies", type=int, metavar="WORKERS", help="That have it at most, as load needs them.")
@click.option("--spare/--no-spare", default=None, help="Keep it on one worker more than load needs.")
@click.option("--region", help="Of the workers that may run it.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="Of the workers that may run it; several: all of them.")
@click.option("--policy", type=click.Choice(get_args(PolicyName)), help="Which of the workers that have it gets a request.")
@click.option("--weight", "weights", multiple=True, metavar="WORKER=N", help="Of a worker, for weighted_round_robin; several.")
@click.option("--hedge", type=float, metavar="0.95", help="Share of answers after whose time a request goes to a second worker, too.")
@click.option("--unset", multiple=True, type=click.Choice(_NAMES), help="Take one back; may be given several times.")
@click.option("--reset", is_flag=True, help="Take all back first.")
@at_lab
@as_json
def serving(name: str, *, unset: tuple[str, ...], reset: bool, target: Target, json_: bool, **said: Any) -> None:
    """Say how NAME is served, all versions, from now on; nothing has to be said. Without options: what was said."""
    changes = {setting: value for setting, value in said.items() if value not in {None, ()}}
    if sizes := changes.pop("preferred_batch_sizes", None):
        changes["preferred_batch_sizes"] = _sizes(sizes)
    changes |= {setting.replace("-", "_"): None for setting in unset}
    with target.connect() as lab:
        if reset:
            lab.reset_serving(name)
        settings = lab.serve(name, **changes) if changes else run(lab.operations.model(name)).serving
    if json_:
        print_json({"name": name, "serving": msgspec.to_builtins(settings)})
        return
    said = msgspec.to_builtins(settings)
    print_table(("setting", "value"), [(setting, _text(value)) for setting, value in said.items() if setting != "rollout"])


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--preferred-batch-sizes {text}: give numbers of rows, as in 4,8,16") from None


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
