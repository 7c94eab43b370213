"""`tether infer`: one request from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tether.cli.options import Target, as_json, at_lab, run
from tether.cli.tables import print_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tether.types import Array, InferResponse

__all__ = ["infer"]


@click.command("infer")
@click.argument("name")
@click.option("--input", "inputs", multiple=True, metavar="[INPUT=]FILE.npy", help="An input's array; may be given several times.")
@click.option("--example", is_flag=True, help="Use the example that was published with the model.")
@click.option("--output", type=click.Path(dir_okay=False), metavar="FILE.npz", help="Write the outputs here instead of printing them.")
@click.option("--stream", is_flag=True, help="Print each part of the answer when the model has made it.")
@click.option("--version", type=click.IntRange(1), help="Version to run  [default: what the name means].")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds to wait.")
@at_lab
@as_json
def infer(
    *,
    name: str,
    inputs: tuple[str, ...],
    example: bool,
    output: str | None,
    stream: bool,
    version: int | None,
    timeout: float | None,
    target: Target,
    json_: bool,
) -> None:
    """Run a model: NAME is "digits", "digits:2" or "digits@prod"."""
    if bool(inputs) == example:
        raise click.UsageError("give --input FILE.npy (or INPUT=FILE.npy for each input), or --example")
    if stream and output is not None:
        raise click.UsageError("--stream prints the parts; without it --output gets all of them, joined")
    with target.connect() as lab:
        exact = name if version is None else f"{name}:{version}"
        tensors = lab.example(exact) if example else _loaded(inputs)
        if stream:
            _print_parts(lab.stream(name, tensors, version=version, timeout=timeout), json_=json_)
            return
        answer = run(lab.operations.answer(name, tensors, version=version, timeout=timeout))
    if output is not None:
        _write(output, answer)
    elif json_:
        print_json(
            {"model": answer.model, "version": answer.version, "outputs": {key: _listed(each) for key, each in answer.outputs.items()}}
        )
    else:
        for key, array in answer.outputs.items():
            click.echo(f"{key}  {array.dtype} {list(array.shape)}\n{array}")


def _print_parts(parts: Iterable[Any], *, json_: bool) -> None:
    """A line for each; texts are written on as they come, as their model meant them."""
    is_text = False
    for part in parts:
        is_text = not json_ and not isinstance(part, dict) and part.dtype.kind == "O"
        if json_:
            click.echo(json.dumps({key: _listed(each) for key, each in part.items()} if isinstance(part, dict) else _listed(part)))
        else:
            click.echo("".join(_listed(part)) if is_text else part, nl=not is_text)
    if is_text:
        click.echo()


def _loaded(inputs: tuple[str, ...]) -> Any:
    """One array where one file without a name is given, else a dict."""
    named = [(key if equals else "", path if equals else key) for key, equals, path in (text.partition("=") for text in inputs)]
    if len(named) == 1 and not named[0][0]:
        return _array(named[0][1])
    if not all(key for key, _ in named) or len({key for key, _ in named}) < len(named):
        raise click.UsageError("with several inputs each needs a name of its own: --input a=A.npy --input b=B.npy")
    return {key: _array(path) for key, path in named}


def _array(path: str) -> Array:
    import numpy as np  # not for `--help`

    try:
        array: Any = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise click.UsageError(f"no file {path}") from None
    except (OSError, ValueError, EOFError) as error:
        raise click.UsageError(f"{path} is no .npy file ({error}); write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise click.UsageError(f"{path} holds several arrays; give one .npy file for each input")
    return array


def _listed(array: Array) -> Any:
    values = array.astype(float) if array.dtype.kind == "V" else array
    return [each.decode(errors="replace") for each in values.reshape(-1).tolist()] if array.dtype.kind == "O" else values.tolist()


def _write(path: str, answer: InferResponse) -> None:
    from tether.lab.tensors import to_npz  # numpy: not for `--help`

    try:
        Path(path).write_bytes(to_npz(answer.outputs))
    except OSError as error:
        raise click.ClickException(f"{path} can't be written: {error.strerror}") from error
