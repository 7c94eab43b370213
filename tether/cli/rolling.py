"""`tether rollout`, `drain`, `restart`: a lab that changes while it serves."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec

from tether.cli.options import Target, as_json, at_lab
from tether.cli.tables import print_json

__all__ = ["drain", "restart", "rollout"]


@click.command("rollout")
@click.argument("name")
@click.argument("version", type=click.IntRange(1), required=False)
@click.option("--steps", metavar="0.05,0.25,1", help="Shares of the requests that VERSION answers, one after the other.")
@click.option("--every", type=click.FloatRange(0), metavar="SECONDS", help="Of each step  [default: 30].")
@click.option("--requests", type=click.IntRange(0), help="That VERSION has to answer in each step besides.")
@click.option("--shadow", type=click.FloatRange(0, 1), metavar="SHARE", help="Of the requests that is copied to it before the first step.")
@click.option("--errors", type=click.FloatRange(0, 1), metavar="SHARE", help="Of its requests that it may fail more  [default: 0.01].")
@click.option("--slower", type=click.FloatRange(1, min_open=True), metavar="TIMES", help="As long as now it may take  [default: 2].")
@click.option("--allow-nan/--no-allow-nan", default=None, help="It may answer NaN to inputs that have none.")
@click.option("--abort", is_flag=True, help="Go back.")
@click.option("--status", "look", is_flag=True, help="Only show how it stands; so do I without VERSION.")
@at_lab
@as_json
def rollout(name: str, version: int | None, *, abort: bool, look: bool, target: Target, json_: bool, **said: Any) -> None:
    """Put VERSION in the place of what NAME means, step by step; it goes back by itself when it does worse."""
    terms = {term: value for term, value in said.items() if value is not None}
    if steps := terms.pop("steps", None):
        terms["steps"] = _shares(steps)
    if version is None and terms:
        raise click.UsageError("say which version is to be rolled out: tether rollout NAME VERSION …")
    with target.connect() as lab:
        found = lab.abort_rollout(name) if abort else lab.rollout(name, None if look else version, **terms)
    if json_:
        print_json(msgspec.to_builtins(found))
    else:
        click.echo(found)


def _shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--steps {text}: give shares, as in 0.05,0.25,1") from None


@click.command("drain")
@click.argument("worker")
@click.option("--patience", type=click.FloatRange(0, 3600), default=30.0, show_default=True, help="Seconds for its models to be elsewhere.")
@click.option("--undo", is_flag=True, help="Have it go on.")
@at_lab
@as_json
def drain(worker: str, *, patience: float, undo: bool, target: Target, json_: bool) -> None:
    """Have WORKER take no more requests, once its models are elsewhere, and wait until it has answered those it has."""
    with target.connect() as lab:
        if undo:
            lab.undrain(worker)
            return
        done = lab.drain(worker, patience=patience)
    if json_:
        print_json(msgspec.to_builtins(done))
    else:
        click.echo(f"{done.worker} is {done.state}")
    if done.goes_on:
        sys.exit(1)


@click.command("restart")
@click.argument("workers", nargs=-1)
@click.option("--patience", type=click.FloatRange(0, 3600), default=30.0, show_default=True, help="Seconds for its models to be elsewhere.")
@click.option("--timeout", type=click.FloatRange(1), default=120.0, show_default=True, help="Seconds for each to be back.")
@at_lab
@as_json
def restart(workers: tuple[str, ...], *, patience: float, timeout: float, target: Target, json_: bool) -> None:
    """Start WORKERS again, one by one, while the lab serves; all, if none is named."""
    with target.connect() as lab:
        done = lab.restart(*workers, patience=patience, timeout=timeout)
    if json_:
        print_json({"restarted": done})
    else:
        click.echo(f"restarted: {', '.join(done) or 'none'}")
