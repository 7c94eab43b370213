"""`tether gateway | orchestrator | worker | manager`: one service each, for deployments of one's own. Their options are their own."""

from __future__ import annotations

import importlib

import click

__all__ = ["gateway", "manager", "orchestrator", "worker"]


def _service(name: str, summary: str) -> click.Command:
    @click.command(name, help=summary, context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        # a service imports its web server or Dask: only the one that runs
        importlib.import_module(f"tether.{name}.service").main(list(arguments))

    return command


gateway = _service("gateway", "Run a gateway: the HTTP door of a lab.")
orchestrator = _service("orchestrator", "Run an orchestrator: the Dask scheduler of a lab.")
worker = _service("worker", "Run a worker: it loads and runs models.")
manager = _service("manager", "Run the model manager: store and catalog.")
