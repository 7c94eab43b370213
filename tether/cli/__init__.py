"""`tether …`, `python -m tether`, `dask tether`: thin commands over `tether.lab` and the services."""

from __future__ import annotations

import click

from tether._version import __version__
from tether.cli.lazy import Commands

__all__ = ["main", "tether"]

_HOMES = {
    "lifecycle": ("up", "down", "status"),
    "logs": ("logs",),
    "events": ("events",),
    "doctor": ("doctor",),
    "models": ("models", "show", "alias", "rollback", "diff", "verify", "repair", "rm", "gc", "trust"),
    "serving": ("serving",),
    "explain": ("explain",),
    "rolling": ("rollout", "drain", "restart"),
    "files": ("publish", "export"),
    "sharing": ("invite", "peers", "allow", "disallow", "accept", "rotate"),
    "labs": ("enrol", "replicate"),
    "copying": ("policy", "hold"),
    "lending": ("lend",),
    "quarantine": ("quarantine",),
    "infer": ("infer",),
    "services": ("gateway", "orchestrator", "worker", "manager"),
}
"""Module → its commands, in the order of `tether --help`."""


@click.group(
    "tether",
    cls=Commands,
    homes={name: f"tether.cli.{module}" for module, names in _HOMES.items() for name in names},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, message="tether %(version)s")
def tether() -> None:
    """Serve models from notebooks, on the machines that you already have.

    `tether up` starts a lab on this machine; `tether publish NAME PATH` gives it a model; `tether infer NAME --example` runs it.
    """


def main() -> None:
    """Entry of the `tether` script. Exit codes: 0, 1 failure, 2 usage."""
    tether(prog_name="tether")
