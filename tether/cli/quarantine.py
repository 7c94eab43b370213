"""`tether quarantine`: inputs that ended the process of their model, and versions that run in processes of their own since."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from tether.cli.options import Target, as_json, at_lab, run
from tether.cli.tables import age_text, print_json, print_table

__all__ = ["quarantine"]


@click.command("quarantine")
@click.option("--clear", metavar="NAME", help="Hold nothing any more against inputs of this model.")
@at_lab
@as_json
def quarantine(clear: str | None, target: Target, json_: bool) -> None:
    """Show which inputs are not run, since they ended the process of their model twice, and which versions run isolated since.

    Both end by themselves after an hour, and with the next version. Isolated versions move back when they are loaded anew.
    """
    with target.connect() as lab:
        client = lab.operations.client
        if clear is not None:
            run(client.forgive(clear))
        held = run(client.quarantine())
    if json_:
        print_json({"quarantine": held})
        return
    print_table(("model", "version", "isolated", "input", "for"), [row for version in held for row in _rows(version, time.time())])


def _rows(version: Mapping[str, Any], now: float) -> Iterator[tuple[object, ...]]:
    name = version["model"], version["version"], "yes" if version["isolated"] else ""
    if not version["poison"]:
        yield *name, "", ""
    for each in version["poison"]:
        yield *name, each["mark"], age_text(each["until"] - now)
