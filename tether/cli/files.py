"""`tether publish`, `tether export`: models in and out."""

from __future__ import annotations

from pathlib import Path

import click

from tether.cli.options import Target, at_lab

__all__ = ["export", "publish"]


def _tags(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    tags: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE", param=parameter)
        tags[key] = text
    return tags


@click.command("publish")
@click.argument("name")
@click.argument("path", type=click.Path())
@click.option("--framework", help="onnx, torch, tensorflow or custom  [default: as the files say].")
@click.option("--alias", "alias_", help='Name for the version, such as "prod".')
@click.option("--example", type=click.Path(exists=True, dir_okay=False), metavar="FILE.npz", help="Inputs to run at publish and to keep.")
@click.option("--encrypt/--no-encrypt", "encrypt", default=None, help="Store it encrypted. For a model that is, one has to be said.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", callback=_tags, help="May be given several times.")
@at_lab
def publish(
    *,
    name: str,
    path: str,
    framework: str | None,
    alias_: str | None,
    example: str | None,
    encrypt: bool | None,
    tags: dict[str, str],
    target: Target,
) -> None:
    """Make the file or folder PATH the next version of model NAME."""
    from tether.wire.npz import from_npz  # numpy: not for `--help`

    tensors = None if example is None else from_npz(Path(example).read_bytes())
    with target.connect() as lab:
        version = lab.publish(name, path, framework=framework, example=tensors, alias=alias_, tags=tags, encrypt=encrypt)
    click.echo(f"{version}  {version.digest[:16]}{'  encrypted' if version.encrypted else ''}")


@click.command("export")
@click.argument("name")
@click.argument("directory", type=click.Path(file_okay=False))
@at_lab
def export(name: str, directory: str, target: Target) -> None:
    """Write a version's files, byte for byte, to an empty or new folder."""
    with target.connect() as lab:
        click.echo(lab.export(name, directory))
