"""`tether up`, `down`, `status`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Literal

import click

from tether.cli.options import Target, as_json, at_lab, data_folder, run
from tether.cli.tables import age_text, print_json, print_table
from tether.config import DataFolder
from tether.errors import NoLabError

if TYPE_CHECKING:
    from tether.lab.launch import UpSettings
    from tether.lab.objects import Version
    from tether.lab.swarm_state import SwarmState

__all__ = ["down", "status", "up"]


def _gpus(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    return "auto" if value == "auto" else click.IntRange(0)(value, param, ctx)


def _workers(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """None, a number, or the fewest and the most."""
    if value is None:
        return None
    numbers = [click.IntRange(0, 256)(each, param, ctx) for each in value.split("..", 1)]
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


@click.command("up")
@click.option("--workers", callback=_workers, metavar="N|MIN..MAX", help="As many, or as requests need  [default: 2, or one for each GPU].")
@click.option("--gpus", callback=_gpus, metavar="auto|N", default="0", show_default=True, help="GPUs of this machine to use; auto: all.")
@click.option("--pretend-gpus", is_flag=True, help="Tag workers with GPUs that are not there, to test placement.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the gateway  [default: 8000, or the next free one].")
@click.option(
    "--bootstrap", metavar="HOST:PORT,…", help="Nodes by which the swarm is entered  [default: TETHER_BOOTSTRAP, else public ones]."
)
@click.option("--region", help="Where the lab is, such as eu-west; remembered  [default: TETHER_REGION, else what was said last].")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="What its workers have, as gpu=a100, for models that need it.")
@click.option("--relay", is_flag=True, help="Let labs that this one knows reach each other through it; it needs a public address.")
@click.option(
    "--relay-through",
    metavar="ADDRESS,…",
    help="Labs to go through where no direct way is found  [default: TETHER_RELAY_THROUGH, else known ones that relay].",
)
@click.option("--no-swarm", is_flag=True, help="Speak with no other lab.")
@click.option("--detach", is_flag=True, help="Return when the lab is up; end it with `tether down`.")
@data_folder
def up(
    workers: int | tuple[int, int] | None, gpus: int | Literal["auto"], no_swarm: bool, detach: bool, data: str | None, **options: Any
) -> None:
    """Start a lab on this machine: scheduler, workers, model manager, gateway."""
    from tether.lab.cards import gpu_count, worker_counts  # processes and TLS: not for `--help`
    from tether.lab.launch import UpSettings, launch

    count = gpu_count(gpus)
    fewest, most = worker_counts(workers, count)
    settings = UpSettings(DataFolder.locate(data), workers=fewest, most_workers=most, gpus=count, swarm=not no_swarm, **options)
    if not detach:
        sys.exit(_stay(settings))
    lab = launch(settings, bound=False)
    _announce(lab.gateway, lab.notes)
    click.echo("End it with `tether down`.")


def _stay(settings: UpSettings) -> int:
    from tether.lab.launch import supervise  # as above

    def announce(supervisor: Any) -> None:
        _announce(supervisor.url, supervisor.notes)
        click.echo("End it with Ctrl-C.")

    return supervise(settings, announce)


def _announce(gateway: str | None, notes: Any) -> None:
    for note in notes:
        click.echo(note)
    click.echo(f"The lab is up: {gateway or 'without a gateway'}")


@click.command("down")
@data_folder
def down(data: str | None) -> None:
    """End the lab of the data folder."""
    from tether.lab.launch import running  # as above

    folder = DataFolder.locate(data)
    found = running(folder)
    if found is None:
        raise NoLabError(f"no lab runs on {folder.root}; nothing to end")
    found.stop()
    click.echo("The lab has ended.")


def _swarm_text(swarm: SwarmState, now: float) -> str:
    if swarm.since is None:
        return ": ".join(filter(None, (swarm.state, swarm.detail)))
    return f"{swarm.state} for {age_text(now - swarm.since)}, {swarm.peers} connected; {swarm.detail}"


def _state(version: Version) -> str:
    held = ["isolated"] if version.isolated else []
    if version.poison:
        held.append(f"{version.poison} inputs refused (`tether quarantine`)")
    return ", ".join([version.state, *held])


@click.command("status")
@at_lab
@as_json
def status(target: Target, json_: bool) -> None:
    """Services, workers and models of a lab, and whether other labs can find it."""
    with target.connect() as lab:
        if json_:
            print_json(run(lab.operations.client.status()))
            return
        found, now = lab.status(), time.time()
    click.echo(f"gateway  {found.gateway or 'none'}\naddress  {found.address or 'none'}\ndata     {found.data}")
    click.echo(f"swarm    {_swarm_text(found.swarm, now)}\n")
    print_table(
        ("service", "state", "for", "pid", "address", "restarts", "last error"),
        [
            (each.name, each.state, age_text(now - each.since), each.pid or "", each.address, each.restarts, each.error)
            for each in found.services
        ],
    )
    click.echo()
    print_table(
        ("worker", "state", "transport", "gpus", "memory", "models"),
        [(each.id, each.state, each.way, each.gpus, each.room, ", ".join(each.models)) for each in found.workers],
    )
    click.echo()
    print_table(
        ("model", "version", "state"), [(model.name, each.version, _state(each)) for model in found.models for each in model.versions]
    )
