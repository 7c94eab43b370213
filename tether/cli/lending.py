"""`tether lend`: workers of this lab, for other labs' models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from tether.cli.options import Target, as_json, at_lab
from tether.cli.tables import print_json, print_table

if TYPE_CHECKING:
    from tether.lab.lending import Loan

__all__ = ["lend"]


@click.command("lend")
@click.argument("lab_", metavar="LAB", required=False)
@click.option("--models", metavar="GLOB", default="*", show_default=True, help="Which of LAB's own models are run here.")
@click.option("--slots", type=click.IntRange(1), help="Requests that LAB may have run here at a time.")
@click.option("--end", is_flag=True, help="Lend LAB none any more.")
@click.option("--list", "list_", is_flag=True, help="Only show what is lent, and what is borrowed.")
@at_lab
@as_json
def lend(lab_: str | None, *, models: str, slots: int | None, end: bool, list_: bool, target: Target, json_: bool) -> None:
    """Lend this lab's workers to LAB, for its own models. LAB: a petname, a key, an address or an invitation with scope `register`."""
    if lab_ is None and end:
        raise click.UsageError("say to whom no workers are lent any more: tether lend LAB --end")
    with target.connect() as lab:
        if lab_ is not None and end:
            lab.end_lending(lab_)
        elif lab_ is not None and not list_:
            lab.lend(lab_, models, slots)
        lent, borrowed = lab.lendings(), lab.borrowings() if list_ else []
    if json_:
        print_json({"lendings": msgspec.to_builtins(lent)} | ({"borrowings": msgspec.to_builtins(borrowed)} if list_ else {}))
        return
    print_table(("to", "models", "slots", "state", "there called", "problem"), [_row(each) for each in lent])
    if borrowed:
        click.echo()
        print_table(
            ("borrowed", "models", "slots", "free", "queue", "gpus"),
            [(each.worker, each.models, each.slots, each.free, f"{each.queue:.2f} s", each.gpus) for each in borrowed],
        )


def _row(each: Loan) -> tuple[object, ...]:
    problem = each.error[1] if each.error else ""
    return each.publisher[:12], each.models, "" if each.slots is None else each.slots, each.state, each.worker or "", problem
