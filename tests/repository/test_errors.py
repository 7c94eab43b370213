"""The tree of errors keeps the promises of tether/errors.py's docstring."""

import ast
import inspect
import pickle
from collections import Counter

import pytest

from tether import errors
from tether.errors import InternalError, RemoteError, RequestError, TetherError, UnavailableError, from_code

BRANCHES = (RequestError, UnavailableError, RemoteError, InternalError)
GRPC = {
    "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "ABORTED",
    "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}  # fmt: skip


def _tree(cls: type[TetherError]) -> list[type[TetherError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _tree(sub))]


ERRORS = sorted({cls for cls in _tree(TetherError) if cls.__module__ == errors.__name__}, key=lambda cls: cls.__name__)
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)


@each_error
def test_code_and_docstring_are_its_own(error):
    assert isinstance(vars(error).get("code"), str), "a subclass must not inherit its parent's code"
    assert vars(error).get("__doc__", "").strip()


def test_no_two_errors_share_a_code():
    shared = [code for code, count in Counter(error.code for error in ERRORS).items() if count > 1]
    assert shared == []


@each_error
def test_http_and_grpc_status_are_those_of_an_error(error):
    assert 400 <= error.http_status <= 599
    assert error.grpc_status in GRPC


@each_error
def test_it_stands_in_one_branch_and_has_that_branchs_kind_of_status(error):
    branches = [branch for branch in BRANCHES if issubclass(error, branch)]
    assert len(branches) == (0 if error is TetherError else 1)


@each_error
def test_message_and_data_survive_pickle(error):
    raised = error("say what to do next", "a" * 64, 7, {"key": ["value"]})
    copy = pickle.loads(pickle.dumps(raised))  # noqa: S301 (our own bytes)
    assert type(copy) is error
    assert copy.args == raised.args
    assert str(copy) == str(raised) == "say what to do next"


@each_error
def test_a_code_brings_its_error_back(error):
    back = from_code(error.code, "message", 1)
    assert type(back) is error
    assert back.args == ("message", 1)


def test_an_unknown_code_of_a_newer_server_keeps_the_message():
    back = from_code("invented_later", "message")
    assert type(back) is TetherError
    assert str(back) == "message"


def test_every_error_is_public():
    assert {error.__name__ for error in ERRORS} | {"from_code"} == set(errors.__all__)


def test_the_module_draws_every_branch():
    drawing = ast.get_docstring(ast.parse(inspect.getsource(errors)))
    assert all(branch.__name__ in drawing for branch in BRANCHES)
