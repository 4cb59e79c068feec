"""One tree of errors, and every status code has its class."""

from __future__ import annotations

import inspect
import re

import pytest
from raising_kit import HOSTILE, Mute

from p2pmoe import errors
from p2pmoe.errors import CallError, LocalError, P2PMoEError, RemoteError, call_error, describe, message_of


def classes() -> list[type[P2PMoEError]]:
    return [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, P2PMoEError)]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^ {4}([ │├└─]*)(\w+Error)\b", line):
            drawn.append((len(match[1]) // 4, match[2]))
    found: list[tuple[int, str]] = []
    path: list[str] = []
    for depth, name in drawn:
        path[depth:] = [name]
        found.append((depth, name))
        parents = [each.__name__ for each in getattr(errors, name).__mro__]
        assert path[::-1] == [each for each in parents if each in path], f"{name} hangs elsewhere"
    assert {name for _, name in found} == {each.__name__ for each in classes()}


def test_names_end_in_error_and_fault_is_ours_or_theirs() -> None:
    for each in classes():
        assert each.__name__.endswith("Error")
        if each is not P2PMoEError:
            assert issubclass(each, LocalError) != issubclass(each, RemoteError)
        assert each.__doc__


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (400, "BadRequestError"),
        (401, "AuthenticationError"),
        (403, "AccessDeniedError"),
        (404, "UnknownExpertError"),
        (409, "ReplayConflictError"),
        (413, "TooLargeError"),
        (426, "WireVersionError"),
        (429, "OverloadedError"),
        (500, "ExpertFailedError"),
        (503, "DrainingError"),
        (504, "ExpiredCallError"),
        (418, "BadRequestError"),
        (599, "ExpertFailedError"),
        (0, "ExpertFailedError"),
        (-1, "ExpertFailedError"),
        (301, "ExpertFailedError"),
    ],
)
def test_a_status_code_picks_its_class(code: int, name: str) -> None:
    error = call_error(code, "why", 3.0)
    assert type(error).__name__ == name
    assert (str(error), error.retry_after_s) == ("why", 3.0)


def test_every_call_error_has_a_code_of_its_own() -> None:
    coded = [each for each in classes() if issubclass(each, CallError) and "code" in vars(each)]
    codes = [each.code for each in coded if each is not CallError]
    assert len(codes) == len(set(codes)) == 11
    for each in coded:
        assert each is CallError or type(call_error(each.code, "")) is each
    for each in (errors.NonFiniteError, errors.OutlierGradientError):
        assert type(call_error(each.code, "")) is errors.BadRequestError


def test_familiar_builtins_catch_them() -> None:
    assert issubclass(errors.DeadlineError, TimeoutError)
    assert issubclass(errors.PeerUnreachableError, ConnectionError)
    assert issubclass(errors.SchemaError, ValueError)
    assert issubclass(errors.UnknownExpertError, LookupError)
    assert errors.ExpertsUnavailableError("x", (1, 2)).rows == (1, 2)
    assert errors.DecodeError("x").code == 400


def test_exit_codes_say_which_kind_of_failure_it_was() -> None:
    assert all(1 <= each.exit_code <= 125 for each in classes())
    kinds = [errors.InvalidUidError, errors.ConfigError, errors.IdentityError, errors.AddressInUseError, RemoteError]
    assert len({each.exit_code for each in kinds}) == 5


# --------------------------------------------------------------------------------- what somebody else's exception says


@pytest.mark.parametrize(("error", "text"), HOSTILE.values(), ids=HOSTILE)
def test_any_exception_is_described_in_one_line_that_can_be_sent(error: BaseException, text: str) -> None:
    assert describe(error) == text
    for said in (describe(error), message_of(error)):
        assert type(said) is str
        assert len(said) <= errors.MAX_MESSAGE_CHARS
        assert said.isprintable()
        assert said.encode("utf-8") is not None


def test_an_error_is_described_where_the_stack_is_used_up() -> None:
    said: list[str] = []

    def sink() -> None:
        try:
            sink()
        except RecursionError as error:
            said.append(describe(error))
            raise

    with pytest.raises(RecursionError):
        sink()
    assert all(said)
    assert said[-1].startswith("RecursionError: maximum recursion depth exceeded")


def test_the_message_of_an_error_is_all_of_it() -> None:
    assert message_of(errors.SchemaError("one, two")) == "one, two"
    assert message_of(Mute()) == "an error whose text cannot be had"
