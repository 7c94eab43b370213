"""`tether explain`: why a model is where it is."""

from __future__ import annotations

import click
import msgspec

from tether.cli.options import Target, as_json, at_lab
from tether.cli.tables import print_json, print_table

__all__ = ["explain"]


@click.command("explain")
@click.argument("name")
@at_lab
@as_json
def explain(name: str, target: Target, json_: bool) -> None:
    """Say of each version of NAME on which workers it is, why there, and why not on the others."""
    with target.connect() as lab:
        placement = lab.explain(name)
    if json_:
        print_json(msgspec.to_builtins(placement))
        return
    print_table(("version", "worker", "state", "why"), list(placement.rows()))
