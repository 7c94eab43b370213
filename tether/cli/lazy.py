"""A group whose commands are imported when they are run, and whose failures are one line on stderr."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from tether.errors import TetherError

__all__ = ["Commands"]


class Commands(click.Group):
    """Command name → module that has a `click.Command` of that name; importing such a module imports nothing heavy."""

    def __init__(self, *args: Any, homes: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._homes = dict(homes or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._homes, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._homes:
            return super().get_command(ctx, cmd_name)
        command = getattr(importlib.import_module(self._homes[cmd_name]), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{self._homes[cmd_name]}.{cmd_name} is no command")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TetherError as error:
            click.echo(f"error: {error} [{error.code}]", err=True)
            ctx.exit(1)
