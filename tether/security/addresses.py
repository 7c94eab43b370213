"""Pure: how people write down a lab (`tether://<address>`) and an invitation to it (`tether://<address>#<secret>`).

An address is the lab's public key in z-base-32, as Holepunch's tools write keys, and four check characters behind it. Hexadecimal is longer
(64 characters against 56) and nothing in it tells a typo; base64 has capitals and marks, which are lost when it is read aloud or a mail
program lowers a host's letters. A wrong address would cost half a minute of looking for a lab that is not there: of a million mistakes one
gets past the check characters.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from tether.errors import BadAddressError, BadKeyError

__all__ = ["SCHEME", "Address", "Link", "Secret", "public_key"]

SCHEME = "tether://"
_ALPHABET = "ybndrfg8ejkmcpqxot1uwisza345h769"
"""z-base-32 (P. O'Whielacronx, 2002): no 0, 2, l, v, which are taken for others."""
_DIGITS = {letter: number for number, letter in enumerate(_ALPHABET)}
_KEY_NBYTES = 32
_ID_NBYTES = 4
_SECRET_NBYTES = 16
_CHECK_BITS = 20
_CHECK = "tether 2026 check characters"
_STORED = "tether 2026 secret of an invitation"


@dataclass(frozen=True, slots=True)
class Address:
    """A lab as people name it. Prints as `tether://…`."""

    key: str
    """The lab's Ed25519 public key, 64 hex digits."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """With or without `tether://`, in any case. Raises: BadAddressError: it was mistyped, or copied in part."""
        return cls(_decode(_stripped(text), _KEY_NBYTES, "an address", "copy all of what `tether status` shows there").hex())

    @property
    def bare(self) -> str:
        """Without `tether://`. Its first 52 characters are the key as `hypercore-id-encoding` writes it."""
        return _encode(bytes.fromhex(self.key))

    def __str__(self) -> str:
        return SCHEME + self.bare


@dataclass(frozen=True, slots=True)
class Secret:
    """What admits its bearer. `text` is what travels; of `value` a lab keeps the hash alone."""

    id: str
    """8 hex digits: which invitation it is. Not secret; finding it in a table may take more or less time."""
    value: bytes
    """128 random bits."""

    @classmethod
    def new(cls) -> Secret:
        return cls(secrets.token_hex(_ID_NBYTES), secrets.token_bytes(_SECRET_NBYTES))

    @classmethod
    def parse(cls, text: str) -> Secret:
        """What stands behind the `#`. Raises: BadAddressError: it was mistyped, or copied in part."""
        data = _decode(text.strip().lower(), _ID_NBYTES + _SECRET_NBYTES, "the secret of an invitation", "copy all of the invitation again")
        return cls(data[:_ID_NBYTES].hex(), data[_ID_NBYTES:])

    @property
    def text(self) -> str:
        return _encode(bytes.fromhex(self.id) + self.value)

    def stored(self) -> bytes:
        """What a lab keeps of it. A fast hash: 128 random bits can't be tried out."""
        return blake3(bytes.fromhex(self.id) + self.value, derive_key_context=_STORED).digest()

    def fits(self, stored: bytes) -> bool:
        """Whether `stored` was made of it; takes the same time either way."""
        return hmac.compare_digest(self.stored(), stored)

    def __repr__(self) -> str:
        return f"Secret({self.id!r}, ***)"


class Link(NamedTuple):
    """What `tether://…` says: whom to connect to and, in an invitation, how to be admitted."""

    address: Address
    secret: Secret | None = None

    @classmethod
    def parse(cls, text: str) -> Link:
        """Raises: BadAddressError: either half was mistyped, or copied in part."""
        head, mark, tail = text.strip().partition("#")
        address = Address.parse(head)
        return cls(address, Secret.parse(tail) if mark else None)

    @property
    def url(self) -> str:
        """All of it, the secret too: for the one who is invited."""
        return f"{self.address}#{self.secret.text}" if self.secret else str(self.address)

    def __str__(self) -> str:
        return f"{self.address}#***" if self.secret else str(self.address)


def public_key(text: str) -> str:
    """The key (hex) that a person named: 64 hex digits, or a lab's address.

    Raises: BadKeyError: it is no point of the curve that somebody can have the secret of; BadAddressError.
    """
    stripped = _stripped(text)
    key = stripped if _is_hex(stripped) else Address.parse(text).key
    if not is_sound(bytes.fromhex(key)):
        raise BadKeyError(f"{key} is nobody's key: take the address that `tether status` shows there")
    return key


def is_sound(key: bytes) -> bool:
    """Whether an Ed25519 key is a point of the curve's large group, written in the one way: for any other, anybody can make signatures."""
    from nacl.bindings import crypto_core_ed25519_is_valid_point  # 20 ms that `tether --help` need not pay

    return len(key) == _KEY_NBYTES and bool(crypto_core_ed25519_is_valid_point(key))


def _is_hex(text: str) -> bool:
    return len(text) == 2 * _KEY_NBYTES and all(letter in "0123456789abcdef" for letter in text)


def _stripped(text: str) -> str:
    return text.strip().lower().removeprefix(SCHEME).rstrip("/")


# --- z-base-32 with check characters


def _encode(data: bytes) -> str:
    return _letters(int.from_bytes(data) << _spare(len(data)), _count(len(data))) + _letters(_check(data), _CHECK_BITS // 5)


def _decode(text: str, nbytes: int, what: str, advice: str) -> bytes:
    """Raises: BadAddressError."""
    expected = _count(nbytes) + _CHECK_BITS // 5
    strange = next((letter for letter in text if letter not in _DIGITS), None)
    if nbytes == _KEY_NBYTES and _is_hex(text):
        raise BadAddressError(f"{text} is a public key; the lab's address is another way to write it: {advice}")
    if strange is not None:
        raise BadAddressError(f"{strange!r} does not occur in {what}: {advice}")
    if len(text) != expected:
        raise BadAddressError(f"{what} has {expected} characters, this has {len(text)}: {advice}")
    number, check = _number(text[: -_CHECK_BITS // 5]), _number(text[-_CHECK_BITS // 5 :])
    data = (number >> _spare(nbytes)).to_bytes(nbytes)
    if number & ((1 << _spare(nbytes)) - 1) or check != _check(data):
        raise BadAddressError(f"a character of {what} is wrong: {advice}")
    return data


def _count(nbytes: int) -> int:
    return -(-8 * nbytes // 5)


def _spare(nbytes: int) -> int:
    """Bits of the last character that say nothing."""
    return 5 * _count(nbytes) - 8 * nbytes


def _letters(number: int, count: int) -> str:
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(count)))


def _number(text: str) -> int:
    number = 0
    for letter in text:
        number = number << 5 | _DIGITS[letter]
    return number


def _check(data: bytes) -> int:
    return int.from_bytes(blake3(data, derive_key_context=_CHECK).digest(length=3)) >> 24 - _CHECK_BITS
