"""Options that several commands share, and the lab that they mean."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

if TYPE_CHECKING:
    from tether.lab.lab import Lab

__all__ = ["Target", "as_json", "at_lab", "data_folder", "run"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

data_folder = click.option(
    "--data", type=click.Path(file_okay=False), help="Data folder of the lab  [default: TETHER_HOME, else your own]."
)
as_json = click.option("--json", "json_", is_flag=True, help="Print JSON.")


class Target(NamedTuple):
    """Which lab a command is for."""

    url: str | None
    api_key: str | None
    data: str | None

    def connect(self) -> Lab:
        """Raises: NoLabError, ServiceUnavailableError."""
        from tether.lab.lab import connect  # numpy and aiohttp: not for `--help`

        return connect(self.url, self.api_key, data=self.data)


def at_lab(command: F) -> F:
    """`--url`, `--api-key`, `--data`; the command gets them as one `target`."""
    import functools

    @functools.wraps(command)
    def with_target(url: str | None, api_key: str | None, data: str | None, **arguments: Any) -> Any:
        return command(target=Target(url, api_key, data), **arguments)

    options = (
        click.option("--url", help="Address of a gateway  [default: of the lab that runs on the data folder]."),
        click.option("--api-key", envvar="TETHER_API_KEY", help="Key for the gateway  [default: TETHER_API_KEY, else the lab's own]."),
        data_folder,
    )
    for option in reversed(options):
        with_target = option(with_target)
    return with_target  # type: ignore[return-value]  # click has put its own callable round it


def run(work: Coroutine[Any, Any, T]) -> T:
    """Wait for one of the client's calls."""
    from tether.lab import loop  # asyncio: not for `--help`

    return loop.run(work)
