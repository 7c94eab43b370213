"""The model manager as a process: the one writer of its store, in a lab or alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from tether.config import MANAGER_PORT, ORCHESTRATOR_PORT, REGION_ENV, DataFolder
from tether.manager.settings import ManagerSettings

__all__ = ["main"]


@click.command("manager")
@click.argument("orchestrator", default=f"tls://127.0.0.1:{ORCHESTRATOR_PORT}")
@click.option("--data", type=click.Path(file_okay=False), help="Data folder of the lab.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=MANAGER_PORT, show_default=True)
@click.option("--take-over", is_flag=True, help="Write, though this store may lack something: the manager that wrote is gone for good.")
@click.option("--gateway", metavar="URL", help="Gateway that runs models for other labs.")
@click.option("--bootstrap", metavar="HOST:PORT,…", help="Nodes by which the swarm is entered.")
@click.option("--region", envvar=REGION_ENV, help="Where the lab is, such as eu-west; it is remembered.")
@click.option("--relay", is_flag=True, help="Let labs that this one knows reach each other through it; it needs a public address.")
@click.option(
    "--relay-through",
    envvar="TETHER_RELAY_THROUGH",
    metavar="ADDRESS,…",
    help="Labs to go through where no direct way to a peer is found  [default: known ones that say that they relay].",
)
@click.option("--no-swarm", is_flag=True, help="Speak with no other lab.")
@click.option("--alone", is_flag=True, help="For the notebooks and programs of this user, without a lab; it ends when they have.")
@click.option(
    "--max-weight-nbytes", default=1 << 30, envvar="TETHER_MAX_WEIGHT_NBYTES", hidden=True, help="Of memory, until it is replaced."
)
@click.option("--weighing", default=60.0, envvar="TETHER_WEIGHING", hidden=True, help="Seconds between looks at its memory.")
@click.option(
    "--max-staged-nbytes",
    default=64 << 30,
    envvar="TETHER_MAX_STAGED_NBYTES",
    show_default=True,
    help="Of blobs that one peer may send before a publish names them; a quarter of the free disk, where that is less.",
)
@click.option("--surplus", default=3600.0, envvar="TETHER_SURPLUS", hidden=True, help="Seconds until a copy that is one too many may go.")
@click.option("--idle", default=60.0, hidden=True, help="Seconds without a client after which a manager that is alone ends.")
def _command(data: str | None, no_swarm: bool, alone: bool, **options: Any) -> None:
    """Run the model manager: store, catalog, publishing. A second one, with a data folder of its own, follows the first and takes over."""
    settings = ManagerSettings(DataFolder.locate(data).create(), swarm=not no_swarm, **options)
    if alone:
        from tether.manager.alone import run
    else:
        from tether.manager.clustered import run  # Dask, which takes as long to import as all else: not for one that is alone
    run(settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `tether manager`."""
    _command(list(arguments) if arguments is not None else None)
