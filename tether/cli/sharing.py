"""`tether allow`, `disallow`, `accept`, `rotate`: who can open encrypted models, and the key that protects their keys."""

from __future__ import annotations

from typing import IO

import click

from tether.cli.options import Target, as_json, at_lab
from tether.cli.tables import print_json

__all__ = ["accept", "allow", "disallow", "rotate"]

_SCOPES = click.option("--scope", "scopes", multiple=True, required=True, metavar="decrypt:NAME", help="May be given several times.")


@click.command("allow")
@click.argument("key")
@_SCOPES
@at_lab
@as_json
def allow(key: str, scopes: tuple[str, ...], target: Target, json_: bool) -> None:
    """Let the lab of this public KEY open encrypted models: prints an envelope that it alone can open, with `tether accept`."""
    with target.connect() as lab:
        envelopes = lab.allow(key, scopes)
    if json_:
        print_json({"peer": key, "envelopes": envelopes})
        return
    for envelope in envelopes.values():
        click.echo(envelope)


@click.command("disallow")
@click.argument("key")
@_SCOPES
@at_lab
@as_json
def disallow(key: str, scopes: tuple[str, ...], target: Target, json_: bool) -> None:
    """Take encrypted models from a lab: later versions get a new key. What it has can't be recalled."""
    with target.connect() as lab:
        revoked = lab.disallow(key, scopes)
    if json_:
        print_json({"peer": key, "models": revoked.models, "envelopes": revoked.envelopes})
        return
    click.echo(revoked.message)
    for name, envelopes in revoked.envelopes.items():
        for other, envelope in envelopes.items():
            click.echo(f"\n{name} for {other}:\n{envelope}")


@click.command("accept")
@click.argument("envelope", type=click.File("r"), default="-")
@at_lab
def accept(envelope: IO[str], target: Target) -> None:
    """Keep the model keys in an ENVELOPE, a file with what `tether allow` printed elsewhere for this lab [default: standard input]."""
    with target.connect() as lab:
        for line in filter(str.strip, envelope):
            click.echo(f"{lab.accept(line)} can be opened now")


@click.command("rotate")
@at_lab
def rotate(target: Target) -> None:
    """Replace the cluster key, which protects the keys of all encrypted models; no model is written anew."""
    with target.connect() as lab:
        key = lab.rotate()
    click.echo(f"the cluster key is {key} now; its file is in the data folder, keys/cluster-{key}.key: back it up")
