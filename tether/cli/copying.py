"""`tether policy`, `hold`: how many copies of models there are to be in other labs, and for which labs this one holds some."""

from __future__ import annotations

import click
import msgspec

from tether.cli.options import Target, as_json, at_lab
from tether.cli.tables import print_json, print_table
from tether.lab.sizes import size_text

__all__ = ["hold", "policy"]


@click.command("policy")
@click.argument("name", required=False)
@click.option("--copies", type=click.IntRange(1), help="Copies in all, this lab's own too; 1: no policy.")
@click.option("--region", "regions", multiple=True, help="Only there; may be given several times.")
@click.option("--pin", multiple=True, metavar="LAB", help="A lab that is to have it in any case; may be given several times.")
@click.option("--budget", type=click.IntRange(0), metavar="BYTES", help="That all copies together may take.")
@at_lab
@as_json
def policy(
    name: str | None,
    *,
    copies: int | None,
    regions: tuple[str, ...],
    pin: tuple[str, ...],
    budget: int | None,
    target: Target,
    json_: bool,
) -> None:
    """Say how many copies of NAME there are to be in all labs; `*`: of each model. Without NAME: what was said.

    They are held by labs that have scope `replicate` for everything and chose to: `tether hold` there.
    """
    if name is not None and copies is None:
        raise click.UsageError("say how many: --copies 2")
    with target.connect() as lab:
        if name is not None:
            lab.policy(name, copies or 1, regions=regions, pin=pin, budget=budget)
        said = lab.policies()
    if json_:
        print_json({"policies": msgspec.to_builtins(said)})
        return
    print_table(
        ("model", "copies", "regions", "pinned to", "budget"),
        [
            (
                model,
                each.copies,
                ", ".join(each.regions),
                ", ".join(key[:12] for key in each.pin),
                "" if each.budget is None else size_text(each.budget),
            )
            for model, each in said.items()
        ],
    )


@click.command("hold")
@click.argument("lab_", metavar="LAB", required=False)
@click.option("--region", default="", help="Where this lab is, in LAB's words.")
@click.option("--room", type=click.IntRange(0), metavar="BYTES", help="That it gives for the copies.")
@click.option("--end", is_flag=True, help="Hold none for LAB any more; what is here stays.")
@at_lab
@as_json
def hold(lab_: str | None, *, region: str, room: int | None, end: bool, target: Target, json_: bool) -> None:
    """Hold copies of LAB's models here, as its policies say. LAB: a petname, a key, an address or an invitation. Without it: for whom."""
    with target.connect() as lab:
        if lab_ is not None and end:
            lab.end_holding(lab_)
        elif lab_ is not None:
            lab.hold(lab_, region=region, room=room)
        held = lab.holdings()
    if json_:
        print_json({"holdings": msgspec.to_builtins(held)})
        return
    print_table(
        ("publisher", "region", "room"),
        [(each.publisher, each.region, "" if each.room is None else size_text(each.room)) for each in held],
    )
