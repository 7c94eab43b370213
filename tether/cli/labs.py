"""`tether enrol`, `replicate`: other labs, and what is kept of them here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tether.cli.options import Target, as_json, at_lab, run
from tether.cli.tables import print_json, print_table
from tether.config import DataFolder
from tether.errors import NoLabError
from tether.lab.sizes import size_text

if TYPE_CHECKING:
    from tether.lab.lab import Lab
    from tether.lab.replicating import Replica

__all__ = ["enrol", "replicate"]


@click.command("enrol")
@click.argument("invitation")
@at_lab
@as_json
def enrol(invitation: str, target: Target, json_: bool) -> None:
    """Use an INVITATION, tether://…#…: find the lab, and be let in there. Afterwards its address is enough.

    Where no lab runs on the data folder, its manager is started for this: `tether.connect(…)` is let in afterwards, too.
    """
    scopes = _joined(invitation, target)
    address = invitation.partition("#")[0]
    if json_:
        print_json({"address": address, "scopes": scopes})
    else:
        click.echo(f"{address} lets this lab in: {', '.join(scopes) or 'as before'}")


def _joined(invitation: str, target: Target) -> list[str]:
    """All that the lab of the data folder may do there, or its owner where none runs."""
    try:
        with target.connect() as lab:
            return lab.join(invitation)
    except NoLabError:
        if target.url is not None:
            raise
    return run(_join_alone(invitation, target.data))


async def _join_alone(invitation: str, data: str | None) -> list[str]:
    from tether.client.own_manager import OwnManager  # what speaks with managers is not for `--help`
    from tether.client.replicating import OwnReplicating

    own = OwnManager(DataFolder.locate(data))
    try:
        return list((await OwnReplicating(own).join(invitation)).get("scopes") or ())
    finally:
        await own.aclose()


@click.command("replicate")
@click.argument("name", required=False)
@click.option("--from", "source", metavar="LAB", help="Whose it is: a petname, a key, an address or an invitation.")
@click.option("--via", metavar="LAB", help="A lab that has it, too.")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds to wait; it comes all the same.")
@click.option("--release", is_flag=True, help="Keep it no longer up to date; what is here stays.")
@at_lab
@as_json
def replicate(
    name: str | None, *, source: str | None, via: str | None, timeout: float | None, release: bool, target: Target, json_: bool
) -> None:
    """Keep a model of another lab here, up to date: NAME with --from, or alice/NAME; `*` is all of them. Without NAME: what is kept."""
    with target.connect() as lab:
        if name is None:
            _show(lab, json_=json_)
        elif release:
            lab.release(name, source)
            click.echo(f"{name} is kept up to date no longer; what is here stays")
        else:
            done = lab.replicate(name, source, via=via, timeout=timeout)
            if json_:
                print_json({"publisher": done.publisher, "model": done.model, "versions": done.versions, "nbytes": done.nbytes})
            else:
                click.echo(str(done))


def _show(lab: Lab, *, json_: bool) -> None:
    if json_:
        print_json({"replications": run(lab.operations.client.replicating.replications())})
        return
    print_table(
        ("model", "publisher", "versions here", "of it here", "size", "problem"),
        [_row(each) for each in lab.replicas()],
    )


def _row(each: Replica) -> tuple[object, ...]:
    problem = each.error[1] if each.error else ""
    return each.model, each.publisher[:12], len(each.versions), f"{each.fraction:.0%}", size_text(each.nbytes), problem
