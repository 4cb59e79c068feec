"""One line and an exit code for everything that can go wrong."""

import errno
import signal

import pytest
import typer

from p2pmoe import errors
from p2pmoe.cli.failures import (
    EXIT_CODES,
    Terminated,
    hold_signals,
    need_package,
    raise_on_sigterm,
    run_guarded,
)
from p2pmoe.errors import P2PMoEError


def all_kinds(root: type[P2PMoEError] = P2PMoEError) -> list[type[P2PMoEError]]:
    return [root, *(each for child in root.__subclasses__() for each in all_kinds(child))]


def fail_with(error: BaseException) -> int:
    def command() -> None:
        raise error

    return run_guarded(command)


@pytest.mark.parametrize("kind", all_kinds())
def test_an_error_of_ours_is_one_line_with_its_exit_code(
    kind: type[P2PMoEError], capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind("the cause;\n   the remedy")
    error.add_note("(while starting: dht)")

    assert fail_with(error) == kind.exit_code
    assert kind.exit_code in EXIT_CODES
    assert capsys.readouterr() == ("", "error: the cause; the remedy (while starting: dht)\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
        (typer.BadParameter("no such thing."), 2, "no such thing; see p2pmoe --help"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (ZeroDivisionError("oops"), 1, "unexpected ZeroDivisionError: oops; run it again with P2PMOE_DEBUG=1"),
    ],
)
def test_other_ends(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(error) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert said in captured.err


def test_a_traceback_is_shown_when_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("P2PMOE_DEBUG", "1")

    assert fail_with(errors.ConfigError("broken")) == 3
    assert "Traceback" in (shown := capsys.readouterr().err)
    assert shown.endswith("error: broken\n")


def test_what_a_command_returns_is_its_exit_code() -> None:
    assert run_guarded(lambda: 130) == 130
    assert run_guarded(lambda: None) == 0


def test_a_missing_package_is_named_with_the_way_to_get_it() -> None:
    error = need_package("the task digits", ModuleNotFoundError("No module", name="sklearn"))

    assert str(error) == "the task digits needs sklearn, which is not installed; run: pip install 'p2pmoe[tasks]'"


def test_a_signal_waits_until_the_block_has_ended() -> None:
    reached = []

    def be_interrupted() -> None:
        with hold_signals():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of the block")

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert reached == ["the end of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_unwinds_when_that_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        raise_on_sigterm()
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
