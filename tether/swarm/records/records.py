r"""Pure: what a lab says of itself to whoever looks it up: signed, expiring, and small enough for one datagram of the DHT.

    record   =  Ed25519 signature (64 bytes) of "tether record v1\0" + body, then the body
    body     =  msgpack array, in the one way that `sign` writes it: the fields of `_Body`
    listing  =  msgpack array of all that the lab holds; the record has its digest, by which one sees that it changed

A record is the mutable value of the lab's own key in the DHT; one finds it by looking up who announced a topic. It has a signature of its
own, since it also travels from peer to peer, and since nobody has to believe the DHT then. The DHT is public: a record shows beginnings of
digests, which tell something to those alone who know the models, and no names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from tether.errors import BadSignatureError, MalformedRecordError
from tether.security.addresses import is_sound
from tether.security.identity import Identity, verify
from tether.types import Digest

__all__ = [
    "LIFETIME",
    "MAX_GPUS",
    "MAX_NAME",
    "MAX_NBYTES",
    "SKEW",
    "Capabilities",
    "Gpu",
    "Held",
    "Record",
    "beginning",
    "decode_listing",
    "encode_listing",
    "next_seq",
    "parse",
    "sign",
    "topic",
]

MAX_NBYTES = 900
"""With what hyperdht puts around a mutable value (key, signature, token, twenty nodes that are closer) one datagram of 1,200 bytes."""
LIFETIME = 1200.0
"""Seconds that a record is good for; it is written anew each 300, so that three writings may fail."""
MAX_LIFETIME = 3600
SKEW = 900.0
"""Seconds by which two hosts' clocks may differ: 600 were seen."""
MAX_LISTING_NBYTES = 4 << 20
_FORMAT = 1
_SIGNED = b"tether record v1\0"
_TOPIC = b"tether/1/topic\0"
"""Sets it apart from the hash of the key itself, which is where hyperdht announces who listens under that key."""
_SIGNATURE_NBYTES = 64
_KEY_NBYTES = 32
_PREFIX_NBYTES = 8
"""Of a version's digest: enough to know whom to ask. Whoever makes another that begins so has gained one question."""
_MAX_SEQ = 1 << 53
"""What JavaScript counts to."""
MAX_GPUS, _MAX_ENDPOINTS, _MAX_HELD = 8, 4, 50_000
_REGION = re.compile(r"[a-z0-9-]{0,32}")
_ENDPOINT = re.compile(r"[0-9A-Za-z.:\[\]-]{1,64}:[0-9]{1,5}")
MAX_NAME = 40
"""Characters of a card's."""
_MAX_MEMORY = 1 << 50
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_WHOLE_PERCENT = 100
_RELAYS = 1
"""Of the flags."""
_MAX_FLAGS = 127
"""One byte."""


class Gpu(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Cards of one kind."""

    name: str
    count: int
    nbytes: int
    """Memory of one."""


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A version that a lab has, as the listing names it."""

    publisher: str
    """Its key, hex."""
    name: str
    version: int
    digest: Digest
    nbytes: int
    loaded: bool
    """Whether a worker has it in memory."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a lab offers."""

    held: Sequence[Held] = ()
    serves: bool = False
    """Whether it runs models for others, who have the scope."""
    region: str = ""
    gpus: tuple[Gpu, ...] = ()
    load: int = 0
    """Per cent of its workers' time."""
    endpoints: tuple[str, ...] = ()
    """`host:port` of a socket that is reached without the DHT, in the same network."""
    relays: bool = False
    """Whether labs that it knows can go through it to each other."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose signature was checked."""

    peer: str
    """The lab's key, hex."""
    seq: int
    """Grows with each record of a lab."""
    issued: float
    """Unix time, by the lab's clock."""
    lifetime: float
    """Seconds. 0: it takes its leave."""
    serves: bool
    region: str
    gpus: tuple[Gpu, ...]
    load: int
    endpoints: tuple[str, ...]
    beginnings: frozenset[str]
    """Of digests of versions that it has, 16 hex digits; as many as there was room for."""
    count: int
    """How many versions it has."""
    listing: str
    """Digest of all of them (`decode_listing`)."""
    relays: bool
    """Whether labs that it knows can go through it to each other."""

    def holds(self, digest: Digest) -> bool | None:
        """Whether it says that it has the version; None: it has more than it could say here."""
        if beginning(digest) in self.beginnings:
            return True
        return None if self.count > len(self.beginnings) else False


class _Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    format: int
    peer: bytes
    seq: int
    issued: int
    lifetime: int
    serves: bool
    region: str
    gpus: tuple[Gpu, ...]
    load: int
    endpoints: tuple[str, ...]
    count: int
    listing: bytes
    beginnings: bytes
    """One after the other, sorted."""
    flags: int
    """What else it does, a bit for each; those of newer versions are passed over."""


_body_decoder = msgspec.msgpack.Decoder(_Body, strict=True)
_listing_decoder = msgspec.msgpack.Decoder(tuple[Held, ...], strict=True)


def topic(publisher: str) -> bytes:
    """What labs that hold or serve models of this publisher (key, hex) announce: 32 bytes, BLAKE2b-256 of a prefix and the key."""
    return hashlib.blake2b(_TOPIC + bytes.fromhex(publisher), digest_size=32).digest()


def beginning(digest: Digest) -> str:
    """As `Record.beginnings` have it."""
    return digest[: 2 * _PREFIX_NBYTES]


def next_seq(last: int, now: float) -> int:
    """For the next record. `last`: of the latest that is known, also from the DHT (0: none); a clock that was set back changes nothing."""
    return max(last + 1, int(now * 1000))


def sign(identity: Identity, offered: Capabilities, seq: int, now: float, lifetime: float = LIFETIME) -> bytes:
    """A record. Of the versions it names the loaded ones first, as many as there is room for.

    Raises: MalformedRecordError: it would not be one, or the rest of it alone is too long.
    """
    body = _Body(
        format=_FORMAT,
        peer=bytes.fromhex(identity.public),
        seq=seq,
        issued=int(now),
        lifetime=int(lifetime),
        serves=offered.serves,
        region=offered.region,
        gpus=offered.gpus,
        load=offered.load,
        endpoints=offered.endpoints,
        count=len({each.digest for each in offered.held}),
        listing=blake3(encode_listing(offered.held)).digest(),
        beginnings=b"",
        flags=_RELAYS * offered.relays,
    )
    room = (MAX_NBYTES - _SIGNATURE_NBYTES - 1 - len(msgspec.msgpack.encode(body))) // _PREFIX_NBYTES  # 1: a longer length of bytes
    if room < 0:
        raise MalformedRecordError(f"a record has at most {MAX_NBYTES} bytes: give fewer or shorter endpoints and GPUs")
    body = msgspec.structs.replace(body, beginnings=_beginnings(offered.held, room))
    _check(body)
    data = msgspec.msgpack.encode(body)
    return identity.sign(_SIGNED + data) + data


def _beginnings(held: Iterable[Held], room: int) -> bytes:
    ordered = sorted(held, key=lambda each: (not each.loaded, each.digest))
    chosen = list(dict.fromkeys(bytes.fromhex(each.digest)[:_PREFIX_NBYTES] for each in ordered))[:room]
    return b"".join(sorted(chosen))


def parse(data: bytes, peer: str | None = None) -> Record:
    """The record, whose signature was checked; whether it is still good, the book decides. `peer`: whose it has to be.

    Raises: MalformedRecordError: it is none, another's, or not signed by the key that it names.
    """
    body = _decoded(data)
    if peer is not None and body.peer.hex() != peer:
        raise MalformedRecordError(f"the record is not that of {peer[:64]}: it was put there by another")
    try:
        verify(body.peer.hex(), _SIGNED + data[_SIGNATURE_NBYTES:], data[:_SIGNATURE_NBYTES])
    except BadSignatureError as error:
        raise MalformedRecordError(f"the record of {body.peer.hex()} was not signed by that key") from error
    if not is_sound(body.peer):
        raise MalformedRecordError(f"anybody can sign for {body.peer.hex()}: it is nobody's key")
    beginnings = (body.beginnings[at : at + _PREFIX_NBYTES].hex() for at in range(0, len(body.beginnings), _PREFIX_NBYTES))
    return Record(
        peer=body.peer.hex(),
        seq=body.seq,
        issued=float(body.issued),
        lifetime=float(body.lifetime),
        serves=body.serves,
        region=body.region,
        gpus=body.gpus,
        load=body.load,
        endpoints=body.endpoints,
        beginnings=frozenset(beginnings),
        count=body.count,
        listing=body.listing.hex(),
        relays=bool(body.flags & _RELAYS),
    )


def peer_of(data: bytes) -> str:
    """Whose a record says that it is; nothing of it was checked but its form. Raises: MalformedRecordError."""
    return _decoded(data).peer.hex()


def _decoded(data: bytes) -> _Body:
    if not _SIGNATURE_NBYTES < len(data) <= MAX_NBYTES:
        raise MalformedRecordError(f"a record has {_SIGNATURE_NBYTES + 1} to {MAX_NBYTES} bytes, this has {len(data)}")
    raw = data[_SIGNATURE_NBYTES:]
    try:
        body = _body_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedRecordError(f"the record can't be read ({error}): its lab may have another version of Tether") from None
    if msgspec.msgpack.encode(body) != raw:
        raise MalformedRecordError("the record is not written in the one way that counts")
    _check(body)
    return body


def _check(body: _Body) -> None:
    """Raises: MalformedRecordError."""
    problems = {
        "its format": body.format != _FORMAT,
        "its key": len(body.peer) != _KEY_NBYTES,
        "its number": not 0 < body.seq < _MAX_SEQ,
        "its times": not (0 < body.issued < _MAX_SEQ and 0 <= body.lifetime <= MAX_LIFETIME),
        "its region": not _REGION.fullmatch(body.region),
        "its GPUs": len(body.gpus) > MAX_GPUS or not all(map(_is_gpu, body.gpus)),
        "its load": not 0 <= body.load <= _WHOLE_PERCENT,
        "its endpoints": len(body.endpoints) > _MAX_ENDPOINTS or not all(map(_ENDPOINT.fullmatch, body.endpoints)),
        "its listing": len(body.listing) != _KEY_NBYTES,
        "its flags": not 0 <= body.flags <= _MAX_FLAGS,
        "its versions": not _are_beginnings(body.beginnings, body.count),
    }
    wrong = [name for name, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise MalformedRecordError(f"the record breaks a rule of the format: {', '.join(wrong)}")


def _is_gpu(gpu: Gpu) -> bool:
    named = len(gpu.name) <= MAX_NAME and gpu.name.isprintable()
    return named and 0 < gpu.count <= _MAX_HELD and 0 <= gpu.nbytes <= _MAX_MEMORY


def _are_beginnings(data: bytes, count: int) -> bool:
    each = [data[at : at + _PREFIX_NBYTES] for at in range(0, len(data), _PREFIX_NBYTES)]
    return len(data) % _PREFIX_NBYTES == 0 and each == sorted(set(each)) and len(each) <= count <= _MAX_HELD


# --- all of it, for those who ask


def encode_listing(held: Iterable[Held]) -> bytes:
    """Canonical: the same versions give the same bytes. Raises: MalformedRecordError: they are too many, or one makes no sense."""
    listed = tuple(sorted(set(held), key=lambda each: (each.publisher, each.name, each.version, each.digest, each.loaded)))
    data = msgspec.msgpack.encode(listed)
    _check_listing(listed, len(data))
    return data


def decode_listing(data: bytes, record: Record) -> tuple[Held, ...]:
    """All that the lab of this record says it has. Raises: MalformedRecordError: it is no listing, or not the one of this record."""
    if len(data) > MAX_LISTING_NBYTES or blake3(data).hexdigest() != record.listing:
        raise MalformedRecordError(f"the listing is not the one that {record.peer} signed: ask for its record again")
    try:
        listed = _listing_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedRecordError(f"the listing of {record.peer} can't be read ({error})") from None
    _check_listing(listed, len(data))
    return listed


def _check_listing(listed: tuple[Held, ...], nbytes: int) -> None:
    if len(listed) > _MAX_HELD or nbytes > MAX_LISTING_NBYTES or not all(map(_is_held, listed)):
        raise MalformedRecordError(f"a listing has at most {_MAX_HELD} versions, each with publisher, name, number, digest and size")


def _is_held(held: Held) -> bool:
    named = _DIGEST.fullmatch(held.publisher) and _MODEL.fullmatch(held.name) and _DIGEST.fullmatch(held.digest)
    return bool(named) and 0 < held.version < _MAX_SEQ and 0 <= held.nbytes <= _MAX_MEMORY
