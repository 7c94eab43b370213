"""How a lab and an invitation are written down, and that a slip of the pen is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import BadAddressError, BadKeyError
from tether.security.addresses import SCHEME, Address, Link, Secret, public_key
from tether.security.identity import Identity

LAB = Identity(bytes(range(32)))
ADDRESS = Address(LAB.public)
KEYS = st.binary(min_size=32, max_size=32).map(bytes.hex)
LETTERS = "ybndrfg8ejkmcpqxot1uwisza345h769"
SMALL_ORDER = (
    "00" * 32,
    "01" + "00" * 31,
    "ec" + "ff" * 30 + "7f",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ed" + "ff" * 30 + "7f",  # p itself: zero, written in another way
    "ff" * 32,
)


@given(KEYS)
def test_an_address_is_the_key_and_comes_back_whatever_mail_programs_do_to_it(key):
    address = Address(key)

    for text in (str(address), address.bare, f"  {str(address).upper()}/ \n"):
        assert Address.parse(text) == address
    assert len(address.bare) == 56


def test_a_node_program_finds_the_key_in_the_first_52_characters():
    # The vectors of z-base-32: bits from the left, what is missing in the last character is zero.
    number = int(LAB.public, 16) << 4
    assert ADDRESS.bare[:52] == "".join(LETTERS[number >> 5 * place & 31] for place in reversed(range(52)))


@given(st.integers(0, 55), st.sampled_from(LETTERS))
def test_one_wrong_character_is_told(place, letter):
    text = ADDRESS.bare
    wrong = text[:place] + letter + text[place + 1 :]

    if wrong != text:
        with pytest.raises(BadAddressError, match="wrong"):
            Address.parse(wrong)


@given(st.integers(0, 54))
def test_two_neighbours_that_changed_places_are_told(place):
    text = ADDRESS.bare
    wrong = text[:place] + text[place + 1] + text[place] + text[place + 2 :]

    if wrong != text:
        with pytest.raises(BadAddressError):
            Address.parse(wrong)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ADDRESS.bare[:-1], "56 characters, this has 55"),
        (ADDRESS.bare + "y", "56 characters, this has 57"),
        ("", "this has 0"),
        (ADDRESS.bare.replace("y", "l", 1), "'l' does not occur"),
        ("http://" + ADDRESS.bare, "':' does not occur"),
        (ADDRESS.bare[:8] + "\n" + ADDRESS.bare[8:], "does not occur"),
        (LAB.public, "is a public key"),
        ("tether://" + "y" * 100_000, "this has 100000"),
    ],
)
def test_what_is_no_address_is_answered_with_what_is_wrong(text, says):
    with pytest.raises(BadAddressError, match=says):
        Address.parse(text)


@given(KEYS, st.binary(min_size=20, max_size=20))
def test_an_invitation_is_an_address_and_a_secret_and_comes_back(key, random):
    link = Link(Address(key), Secret(random[:4].hex(), random[4:]))

    assert Link.parse(link.url) == link
    assert Link.parse(str(link.address)) == Link(link.address)


def test_a_link_with_half_a_secret_is_told_before_anybody_is_asked():
    url = Link(ADDRESS, Secret.new()).url
    for cut in (url[:-1], url[: url.index("#") + 1], url + "#y"):
        with pytest.raises(BadAddressError, match="secret"):
            Link.parse(cut)


def test_nothing_that_is_printed_by_chance_shows_a_secret():
    secret = Secret.new()
    link = Link(ADDRESS, secret)
    shown = f"{link} {link!r} {secret} {secret!r} {[link]}"

    assert secret.text not in shown
    assert secret.value.hex() not in shown
    assert repr(secret.value) not in shown
    assert secret.text in link.url


def test_secrets_differ_and_what_is_kept_of_one_fits_it_alone():
    one, other = Secret.new(), Secret.new()

    assert one.text != other.text
    assert len(one.value) == 16
    assert one.fits(one.stored())
    assert not other.fits(one.stored())
    assert not Secret(other.id, one.value).fits(one.stored())
    assert one.value not in one.stored()


def test_a_key_may_be_given_as_digits_or_as_an_address():
    for text in (LAB.public, LAB.public.upper(), str(ADDRESS), ADDRESS.bare):
        assert public_key(text) == LAB.public


@pytest.mark.parametrize("key", SMALL_ORDER)
def test_a_key_under_which_anybody_can_sign_is_nobodys(key):
    with pytest.raises(BadKeyError, match="nobody's"):
        public_key(key)
    with pytest.raises(BadKeyError):
        public_key(SCHEME + Address(key).bare)
