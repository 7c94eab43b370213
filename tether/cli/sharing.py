"""`tether invite`, `allow`, `disallow`, `peers`, `accept`, `rotate`: who is let in from outside, and who can open encrypted models."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

import click
import msgspec

from tether.cli.options import Target, as_json, at_lab, run
from tether.cli.tables import age_text, print_json, print_table

if TYPE_CHECKING:
    from tether.lab.outsiders import Invitation, PeerInfo

__all__ = ["accept", "allow", "disallow", "invite", "peers", "rotate"]

_SCOPES = click.option(
    "--scope", "scopes", multiple=True, metavar="SCOPE", help="infer:digits*, decrypt:NAME …; may be given several times."
)


@click.command("invite")
@click.argument("model", required=False)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("infer",),
    metavar="SCOPE",
    help="A verb for MODEL, or a whole scope: infer:digits*  [default: infer].",
)
@click.option("--expires", default="30d", show_default=True, metavar="90s|12h|30d|never", help="How long the link is good.")
@click.option("--uses", type=click.IntRange(1), default=1, show_default=True, help="How many keys may come by it.")
@click.option("--label", default="", help="Who it is for.")
@click.option("--list", "listed", is_flag=True, help="List the invitations that were made.")
@click.option("--revoke", metavar="ID", help="Let nobody in by this invitation any more.")
@at_lab
@as_json
def invite(
    model: str | None,
    scopes: tuple[str, ...],
    *,
    expires: str,
    uses: int,
    label: str,
    listed: bool,
    revoke: str | None,
    target: Target,
    json_: bool,
) -> None:
    """Make a link that lets a colleague in: to run MODEL, or every model. She opens it with `tether.connect(…)`."""
    with target.connect() as lab:
        if listed and json_:
            print_json({"invitations": run(lab.operations.client.admitting.invitations())})
            return
        if listed:
            _print_invitations(lab.invitations())
            return
        if revoke is not None:
            _say_revoked(lab.revoke_invitation(revoke), json_=json_)
            return
        made = lab.invite(model, scopes, expires=expires, uses=uses, label=label)
    if json_:
        print_json(msgspec.to_builtins(made))
        return
    click.echo(made.url)
    whom = "one key" if made.uses == 1 else f"{made.uses} keys"
    until = "" if made.expires is None else f" for {age_text(made.expires - made.created)}"
    click.echo(f"lets {whom} in{until}: {', '.join(made.scopes)}; `tether invite --revoke {made.id}` ends it", err=True)


def _print_invitations(made: Iterable[Invitation]) -> None:
    now = time.time()
    print_table(
        ("id", "state", "used", "scopes", "label", "age"),
        [
            (
                each.id,
                each.problem or "open",
                f"{len(each.peers)}/{each.uses}",
                ", ".join(each.scopes),
                each.label,
                age_text(now - each.created),
            )
            for each in made
        ],
    )


def _say_revoked(revoked: Invitation, *, json_: bool) -> None:
    if json_:
        print_json(msgspec.to_builtins(revoked))
        return
    click.echo(f"invitation {revoked.id} lets nobody in any more")
    for peer in revoked.peers:
        click.echo(f"{peer} came by it and stays: `tether disallow {peer}` sends it away", err=True)


@click.command("allow")
@click.argument("key")
@_SCOPES
@click.option("--label", help="Who it is, for `tether peers`.")
@at_lab
@as_json
def allow(key: str, scopes: tuple[str, ...], label: str | None, target: Target, json_: bool) -> None:
    """Let the holder of KEY (a public key, an address, a name that `tether peers` shows) do more here.

    For decrypt:NAME it prints an envelope, which that lab alone can open with `tether accept`.
    """
    if not scopes:
        raise click.UsageError("give what it may do: --scope infer:digits")
    with target.connect() as lab:
        allowed = lab.allow(key, scopes, label)
    if json_:
        print_json(msgspec.to_builtins(allowed))
        return
    for envelope in allowed.envelopes.values():
        click.echo(envelope)
    click.echo(f"{allowed.peer} may: {', '.join(allowed.scopes)}", err=bool(allowed.envelopes))
    if allowed.note:
        click.echo(allowed.note, err=True)


@click.command("disallow")
@click.argument("key")
@_SCOPES
@at_lab
@as_json
def disallow(key: str, scopes: tuple[str, ...], target: Target, json_: bool) -> None:
    """Take scopes from KEY, all of them where none is named.

    Of encrypted models later versions get a new key; what it has can't be recalled.
    """
    with target.connect() as lab:
        revoked = lab.disallow(key, scopes or None)
    if json_:
        print_json(msgspec.to_builtins(revoked))
        return
    click.echo(revoked.message)
    for name, envelopes in revoked.envelopes.items():
        for other, envelope in envelopes.items():
            click.echo(f"\n{name} for {other}:\n{envelope}")


@click.group("peers", invoke_without_command=True)
@click.option("--all", "every", is_flag=True, help="Strangers too: who is merely connected, or says that it holds models.")
@at_lab
@as_json
@click.pass_context
def peers(context: click.Context, *, every: bool, target: Target, json_: bool) -> None:
    """List who was let in, what they may do, how they are connected, and what they say they have."""
    if context.invoked_subcommand is not None:
        return
    with target.connect() as lab:
        if json_:
            print_json({"peers": run(lab.operations.client.admitting.peers())})
            return
        found = lab.peers.values()
    shown = [each for each in found if every or not each.stranger]
    head = ("name", "state", "scopes", "connected", "round trip", "holds", "region", "gpus", "load", "key")
    print_table(head, [_row(each) for each in shown])
    if others := len(found) - len(shown):
        click.echo(f"and {others} other{'s' if others > 1 else ''} that nobody here knows: --all lists them", err=True)


def _row(peer: PeerInfo) -> tuple[object, ...]:
    trip = "" if peer.round_trip is None else f"{peer.round_trip * 1000:.0f} ms"
    connected = (peer.route or "", trip)
    return (
        peer.petname or peer.label,
        peer.state,
        ", ".join(peer.scopes),
        *connected,
        peer.holds,
        peer.region,
        peer.cards,
        peer.busy,
        peer.peer,
    )


@peers.command("name")
@click.argument("key")
@click.argument("petname")
@at_lab
def name(key: str, petname: str, target: Target) -> None:
    """Call the lab of KEY by a name of your own: its models are PETNAME/model then."""
    with target.connect() as lab:
        lab.name_peer(key, petname)
    click.echo(f"its models are {petname}/… now")


@peers.command("ban")
@click.argument("key")
@click.option("--reason", default="by hand", show_default=True)
@at_lab
def ban(key: str, reason: str, target: Target) -> None:
    """Speak with KEY no more at all, whatever it was allowed."""
    with target.connect() as lab:
        banned = lab.ban(key, reason)
    click.echo(f"{banned.peer} is not spoken with any more")


@peers.command("unban")
@click.argument("key")
@at_lab
def unban(key: str, target: Target) -> None:
    """Forgive KEY: it may again what it was allowed."""
    with target.connect() as lab:
        forgiven = lab.unban(key)
    click.echo(f"{forgiven.peer} may: {', '.join(forgiven.scopes) or 'nothing'}")


@click.command("accept")
@click.argument("envelope", type=click.File("r"), default="-")
@at_lab
def accept(envelope: IO[str], target: Target) -> None:
    """Keep the model keys in an ENVELOPE, a file with what `tether allow` printed elsewhere for this lab [default: standard input]."""
    with target.connect() as lab:
        for line in filter(str.strip, envelope):
            click.echo(f"{lab.accept(line)} can be opened now")


@click.command("rotate")
@at_lab
def rotate(target: Target) -> None:
    """Replace the cluster key, which protects the keys of all encrypted models; no model is written anew."""
    with target.connect() as lab:
        key = lab.rotate()
    click.echo(f"the cluster key is {key} now; its file is in the data folder, keys/cluster-{key}.key: back it up")
