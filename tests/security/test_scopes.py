"""The grammar of scopes, and what each opens: what is not said is refused."""

import itertools
import re
import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import BadScopeError
from tether.security.scopes import METHODS, VERBS, Scope, Scopes

NAMES = st.from_regex(re.compile(r"[a-z0-9][a-z0-9._-]{0,12}(~[a-z0-9][a-z0-9._-]{0,12})?"), fullmatch=True)
GLOBS = st.from_regex(re.compile(r"[a-z0-9._-]{0,5}\*?[a-z0-9._-]{1,5}\*?"), fullmatch=True)


@given(st.sampled_from(["infer", "models", "publish", "replicate", "events"]), st.one_of(st.just(""), GLOBS, NAMES))
def test_a_scope_is_what_it_prints(verb, models):
    scope = Scope.parse(f"{verb}:{models}" if models else verb)

    assert Scope.parse(str(scope)) == scope
    assert (scope.verb, scope.models) == (verb, models)


@pytest.mark.parametrize(
    "text",
    ["", "infer:", "Infer", "manage", "code", "infer digits", "infer:Digits", "infer:a b", "infer:a~b~c", "infer:~", "infer:a~",
     "infer:*a*b*", "infer:" + "a" * 65, "infer:(a|b)", "infer:.+\n", "infer:../x", "register:x", "register:", "decrypt",
     "decrypt:a*", "decrypt:alice~a", "decrypt:", "infer:digits:3", "infer:digits@prod", "infer:ⅾigits", "x" * 1_000_000],
)  # fmt: skip
def test_what_is_no_scope_is_refused(text):
    with pytest.raises(BadScopeError):
        Scope.parse(text)


@pytest.mark.parametrize(
    ("scope", "model", "covered"),
    [
        ("infer", "digits", True),
        ("infer", "alice~digits", True),
        ("infer:digits", "digits", True),
        ("infer:digits", "digits2", False),
        ("infer:digits*", "digits2", True),
        ("infer:*-prod", "digits-prod", True),
        ("infer:*", "digits", True),
        ("infer:*", "alice~digits", False),
        ("infer:digits*", "digits~x", False),
        ("infer:alice~*", "alice~digits", True),
        ("infer:alice~*", "bob~digits", False),
        ("infer:*~digits", "bob~digits", True),
        ("infer:a.c", "abc", False),
        ("infer:digits*", "DIGITS", False),
        ("infer:digits*", "digits:3", False),
        ("infer:digits*", "digits@prod", False),
        ("infer:digits*", "digits\n", False),
        ("infer", "", False),
        ("infer", "a~b~c", False),
        ("infer", "a" * 1_000_000, False),
    ],
)
def test_what_a_scope_covers(scope, model, covered):
    assert Scope.parse(scope).covers(model) is covered
    assert Scopes.parse([scope]).may("infer", model) is covered


@given(GLOBS, NAMES)
def test_a_glob_means_what_its_letters_say(glob, name):
    want = "~" not in name and re.fullmatch(".*".join(map(re.escape, glob.split("*"))), name) is not None
    assert Scopes.parse([f"infer:{glob}"]).may("infer", name) is want


def test_no_verb_opens_what_is_anothers():
    opens = {
        "infer": {"ping", "heads", "infer", "stream", "parts", "unstream", "capacity", "models"},
        "models": {"ping", "heads", "models", "feed"},
        "publish": {"ping", "heads", "stage", "publish", "alias", "models"},
        "replicate": {"ping", "heads", "manifest", "have", "blobs", "models", "feed"},
        "events": {"ping", "heads", "events"},
        "decrypt": {"ping", "heads", "envelope"},
        "register": {"ping", "heads", "register"},
    }
    assert opens.keys() == VERBS.keys()
    for verb, methods in opens.items():
        scopes = Scopes.parse([verb + ":digits" * (verb == "decrypt")])
        assert {method for method in METHODS if scopes.may(method)} == methods


def test_a_method_that_shows_everything_is_not_opened_by_a_part():
    for part in ("models:digits*", "models:*", "replicate:*", "replicate:*~*"):
        assert not Scopes.parse([part, "infer"]).may("feed")
        assert not Scopes.parse([part, "infer"]).may("have")  # the listing names every model, and its digest is of the whole
    assert Scopes.parse(["models"]).may("feed")
    assert Scopes.parse(["replicate"]).may("have")


def test_nobody_without_scopes_may_anything_and_no_method_is_invented():
    for method, model in itertools.product([*METHODS, "enrol", "run_function", "__class__", ""], (None, "digits")):
        assert not Scopes().may(method, model)
    everything = Scopes.parse([verb + ":digits" * (verb == "decrypt") for verb in VERBS])
    for number in range(1000):
        assert not everything.may(f"invented-{number}", "digits")
    assert len(everything._rules) <= len(METHODS)


def test_scopes_are_added_and_taken_away_exactly():
    scopes = Scopes.parse(["infer:a*", "models"]).with_([Scope.parse("infer:b")])
    assert scopes.texts() == ["infer:a*", "infer:b", "models"]
    assert scopes.without([Scope.parse("infer:a*"), Scope.parse("register")]) == Scopes.parse(["models", "infer:b"])
    with pytest.raises(BadScopeError, match="at most 64"):
        Scopes.parse(f"infer:m{number}" for number in range(65))


SOME_GLOBS = st.from_regex(re.compile(r"[ab*]{1,4}(~[ab*]{1,3})?"), fullmatch=True).filter(
    lambda glob: all(half.count("*") < 3 for half in glob.split("~"))
)


@given(SOME_GLOBS, SOME_GLOBS)
def test_two_globs_meet_where_a_name_fits_both_and_one_includes_the_other_where_no_name_fits_it_alone(one, other):
    names = ["".join(letters) for count in range(1, 8) for letters in itertools.product("ab", repeat=count)]
    names += [f"{left}~{right}" for left in names[:62] for right in names[:30]]
    first, second = Scope("infer", one), Scope("infer", other)
    patterns = [re.compile(scope.pattern) for scope in (first, second)]
    of_first, of_second = ({name for name in names if pattern.fullmatch(name)} for pattern in patterns)
    assert first.meets(second) == second.meets(first) == bool(of_first & of_second)
    if first.includes(second):
        assert of_second <= of_first


def test_what_is_for_all_includes_and_meets_all_of_its_verb():
    everything, some = Scope.parse("infer"), Scope.parse("infer:alice~*")
    assert everything.includes(some)
    assert not some.includes(everything)
    assert everything.meets(some)
    assert not everything.meets(Scope.parse("models"))
    assert Scope.parse("infer:digits*").includes(Scope.parse("infer:digits-2*"))
    assert not Scope.parse("infer:digits-2*").includes(Scope.parse("infer:digits*"))


@pytest.mark.parametrize(
    ("held", "gone", "still"),
    [
        (["infer"], ["infer:digits"], ["infer"]),
        (["infer", "infer:digits"], ["infer:digits"], ["infer"]),
        (["infer", "infer:digits"], ["infer"], []),
        (["infer:digits"], ["infer"], ["infer:digits"]),
        (["infer:digits*", "infer:*-2"], ["infer:digits*"], ["infer:*-2"]),
        (["infer:digits", "models"], ["infer:digits"], []),
        (["models"], ["infer:digits"], []),
        (["register"], ["register"], []),
        (["decrypt:a", "decrypt:b"], ["decrypt:a"], []),
    ],
)
def test_what_would_still_open_what_is_taken_is_named(held, gone, still):
    assert Scopes.parse(held).still_open(Scopes.parse(gone)).texts() == still


def test_a_check_takes_microseconds_even_for_the_worst_names(measured):
    scopes = Scopes.parse(f"infer:a*{number}*b" for number in range(64))
    plain = min(timeit.repeat(lambda: scopes.may("infer", "a1b"), number=2000, repeat=5)) / 2000
    worst = min(timeit.repeat(lambda: scopes.may("infer", "a" * 64), number=20, repeat=5)) / 20
    measured(f"a check of a scope: {plain * 1e6:.1f} µs; 64 globs against a name made to be slow: {worst * 1e6:.0f} µs")
    assert worst < 0.01
