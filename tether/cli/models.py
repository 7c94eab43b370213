"""`tether models`, `show`, `alias`, `rollback`, `diff`, `verify`, `repair`, `rm`, `gc`, `trust`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click
import msgspec

from tether.cli.options import Target, as_json, at_lab, run
from tether.cli.tables import age_text, pairs_text, print_json, print_table
from tether.errors import NoLabError, NotFoundError, UnsupportedError
from tether.lab.sizes import size_text

if TYPE_CHECKING:
    from tether.lab.copying import Copies
    from tether.lab.objects import Model
    from tether.lab.operations import Operations

__all__ = ["alias", "diff", "gc", "models", "repair", "rm", "rollback", "show", "trust", "verify"]


@click.command("models")
@at_lab
@as_json
def models(target: Target, json_: bool) -> None:
    """List the lab's models."""
    with target.connect() as lab:
        if json_:
            print_json({"models": run(lab.operations.client.models())})
            return
        found = lab.models.values()
    print_table(("name", "versions", "default", "framework", "size", "aliases"), [_row(model) for model in found])


def _row(model: Model) -> tuple[object, ...]:
    newest = model.versions[-1] if model.versions else None
    shown = ("", "") if newest is None else (newest.framework or "?", size_text(newest.nbytes))
    return model.name, len(model.versions), model.default, *shown, pairs_text(model.aliases)


@click.command("show")
@click.argument("name")
@at_lab
@as_json
def show(name: str, target: Target, json_: bool) -> None:
    """One model: its versions, aliases, inputs and outputs."""
    with target.connect() as lab:
        if json_:
            print_json(run(lab.operations.client.model(name)))
            return
        model = run(lab.operations.model(name))
        copies = run(_copies(lab.operations, name))
        rollout = None if model.serving.rollout is None else run(lab.operations.rollout(name))
    _print_versions(model)
    if rollout is not None:
        click.echo(f"\nrollout: {rollout}")
    if copies is not None:
        _print_copies(copies)
    newest = next((version for version in model.versions if version.version == model.default), None)
    if newest is not None:
        click.echo(f"\n{newest}")
        sides = (("input", newest.inputs), ("output", newest.outputs))
        print_table(
            ("", "name", "datatype", "shape"),
            [(side, spec.name, spec.datatype, list(spec.shape)) for side, specs in sides for spec in specs],
        )


async def _copies(operations: Operations, name: str) -> Copies | None:
    """Where it is, if that was agreed on; None: nothing was, or the lab does not tell: it is elsewhere, or of an earlier version."""
    try:
        copies = await operations.copies(name)
    except (UnsupportedError, NotFoundError):
        return None
    return None if copies.policy is None else copies


def _print_copies(copies: Copies) -> None:
    click.echo()
    print_table(("in lab", "copy"), copies.rows())
    if copies.short:
        click.echo(copies.short)


def _print_versions(model: Model) -> None:
    now = time.time()
    named = {number: [alias for alias in sorted(model.aliases) if model.aliases[alias] == number] for number in model.aliases.values()}
    print_table(
        ("version", "framework", "size", "age", "aliases", "tags", "digest"),
        [
            (
                each.version,
                each.framework or "?",
                size_text(each.nbytes),
                age_text(now - each.created),
                ", ".join(named.get(each.version, [])),
                pairs_text(each.tags),
                each.digest[:16],
            )
            for each in model.versions
        ],
    )
    encrypted = [str(each.version) for each in model.versions if each.encrypted]
    if encrypted:
        click.echo(f"\nencrypted: {', '.join(encrypted)}")


@click.command("alias")
@click.argument("name")
@click.argument("alias_", metavar="ALIAS")
@click.argument("version", type=click.IntRange(1))
@at_lab
def alias(name: str, alias_: str, version: int, target: Target) -> None:
    """Let NAME@ALIAS mean VERSION; "prod" is what the bare name means."""
    with target.connect() as lab:
        lab.alias(name, alias_, version)
    click.echo(f"{name}@{alias_} is now {name}:{version}")


@click.command("rollback")
@click.argument("name")
@click.option("--alias", "alias_", help='Alias to move back  [default: "prod", else "latest"].')
@at_lab
def rollback(name: str, alias_: str | None, target: Target) -> None:
    """Move an alias back to the version it meant before."""
    with target.connect() as lab:
        moved = lab.rollback(name, alias_)
    click.echo(f"{name}@{moved.alias} is now {name}:{moved.after} (was {name}:{moved.before})")


@click.command("verify")
@click.argument("name")
@at_lab
@as_json
def verify(name: str, target: Target, json_: bool) -> None:
    """Read every byte of a model ("digits", or one version: "digits:2") and compare it with its digest."""
    with target.connect() as lab:
        found = lab.verify(name)
    if json_:
        problems = [{"path": each.path, "digest": each.digest, "code": each.code, "error": each.error} for each in found.problems]
        print_json({"ok": found.ok, "checked": found.checked, "nbytes": found.nbytes, "problems": problems})
    elif found:
        click.echo(f"{name}: {found.checked} blobs, {size_text(found.nbytes)}: all well")
    else:
        print_table(("path", "digest", "problem"), [(each.path, each.digest[:16], each.error) for each in found.problems])
    sys.exit(0 if found else 1)


@click.command("diff")
@click.argument("name")
@click.argument("before")
@click.argument("after")
@at_lab
@as_json
def diff(name: str, before: str, after: str, target: Target, json_: bool) -> None:
    """Which tensors changed from version BEFORE to AFTER (numbers or aliases), and by how much."""
    with target.connect() as lab:
        found = lab.diff(name, *(int(text) if text.isdecimal() else text for text in (before, after)))
    if json_:
        print_json(msgspec.to_builtins(found))
        return
    print_table(("tensor", "", "before", "after", "relative", "largest", "elements"), found.rows())
    click.echo(f"{found.unchanged} tensors unchanged; {size_text(found.new_nbytes)} new, {size_text(found.shared_nbytes)} shared")


@click.command("rm")
@click.argument("name")
@click.argument("version", type=click.IntRange(1))
@at_lab
def rm(name: str, version: int, target: Target) -> None:
    """Forget a version; `tether gc` frees its space a day later."""
    with target.connect() as lab:
        lab.delete(name, version)
    click.echo(f"{name}:{version} is gone; its number is not given again")


@click.command("repair")
@click.argument("name", required=False)
@click.option("--from", "source", type=click.Path(exists=True), help="The file or folder that the version was published from.")
@click.option("--index", is_flag=True, help="First read from the packs again where each blob lies; also where no lab runs.")
@at_lab
@as_json
def repair(name: str | None, source: str | None, index: bool, target: Target, json_: bool) -> None:
    """Mend what is damaged of a model ("digits", or one version: "digits:2"); only what is damaged is sent."""
    if name is None and (source is not None or not index):
        raise click.UsageError("give the NAME of a model, or --index")
    if index:
        packs = _rebuild_index(target)
        if name is not None or not json_:
            click.echo(f"index read again from {packs} packs", err=name is not None)
        else:
            print_json({"packs": packs})
    if name is not None:
        _repair(name, source, target, json_=json_)


def _rebuild_index(target: Target) -> int:
    try:
        with target.connect() as lab:
            return int(run(lab.operations.client.rebuild_index())["packs"])
    except NoLabError:
        if target.url is not None:
            raise
        from tether.lab.mending import rebuild_index  # the store, which `--help` needs not

        return rebuild_index(target.data)


def _repair(name: str, source: str | None, target: Target, *, json_: bool) -> None:
    with target.connect() as lab:
        done = lab.repair(name, source)
    if json_:
        print_json(msgspec.to_builtins(done))
    else:
        click.echo(f"{name}: {len(done.found)} damaged, {len(done.repaired)} mended")
        for line in done.advice:
            click.echo(line, err=True)
    sys.exit(0 if done else 1)


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted, and why.")
@click.option(
    "--forget", metavar="STORE", help="First forget a host that shared the packs and is gone for good, by the id that `gc` names."
)
@click.option("--grace", type=click.FloatRange(0), help="Seconds for which what no version names is kept  [default: a day].")
@at_lab
@as_json
def gc(dry_run: bool, forget: str | None, grace: float | None, target: Target, json_: bool) -> None:
    """Delete what no version names any more."""
    with target.connect() as lab:
        if forget is not None:
            was = run(lab.operations.client.forget_store(forget))["was"]
            click.echo(f"forgotten: {was}", err=True)
        done = lab.gc(dry_run=dry_run, grace=grace)
    if json_:
        print_json(msgspec.to_builtins(done))
    else:
        click.echo(str(done))


@click.command("trust")
@click.argument("key")
@click.option("--code", is_flag=True, required=True, help="Trust the key's holder to publish models that run code here.")
@at_lab
def trust(key: str, code: bool, target: Target) -> None:
    """Trust a publisher, named by a public key."""
    with target.connect() as lab:
        lab.trust(key, ("code",) if code else ())
    click.echo(f"{key} is trusted for code")
