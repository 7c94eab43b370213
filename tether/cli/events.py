"""`tether events`: what happens in the lab."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from tether.cli.options import Target, as_json, at_lab
from tether.cli.tables import plain

if TYPE_CHECKING:
    from tether.routing.lab_events import LabEvent

__all__ = ["events"]


@click.command("events")
@click.option("-f", "--follow", is_flag=True, help="Print what comes, until Ctrl-C.")
@at_lab
@as_json
def events(follow: bool, target: Target, json_: bool) -> None:
    """Print what happened in the lab lately: models published, loaded and moved, workers that came and went. With --json one a line."""
    with suppress(KeyboardInterrupt), target.connect() as lab:
        seq = None
        for event in lab.recent_events():
            _print(event, json_=json_)
            seq = event.seq
        for event in lab.events(seq) if follow else ():
            _print(event, json_=json_)


def _print(event: LabEvent, *, json_: bool) -> None:
    import msgspec  # not for `--help`

    if json_:
        click.echo(msgspec.json.encode(event).decode())
    else:
        click.echo(plain(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.at))}  {event}"))
