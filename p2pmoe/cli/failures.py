"""What a failure becomes for the shell: one line on standard error and an exit code. Knows no command."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import typer

from p2pmoe.cli.terminal import complain, finish_streams, legible, text_of
from p2pmoe.errors import ConfigError, P2PMoEError

EXIT_UNEXPECTED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOTHING_FOUND: Final = 7
EXIT_HANGUP: Final = 129
EXIT_INTERRUPTED: Final = 130
EXIT_TERMINATED: Final = 143

EXIT_CODES: Final = {
    0: "done; for a node: left in good order",
    1: "something unexpected, or nobody takes the output; P2PMOE_DEBUG=1 or --debug shows the traceback",
    2: "wrong usage: a flag, a uid or a pattern",
    3: "a setting is wrong: node.toml, a P2PMOE_ variable, a flag",
    4: "a key file or a delegation cannot be used",
    5: "a port is taken or not allowed",
    6: "the swarm: a peer is unreachable, silent, or answered with an error",
    7: "nothing found: no such expert is alive",
    8: "kept experts: a checkpoint cannot be used, or belongs to another expert",
    129: "SIGHUP: the terminal has gone (a node drains and ends with 0); the parent of --exit-with-parent has ended",
    130: "Ctrl-C (a node: the second one)",
    143: "SIGTERM (a node: the second one)",
}


class Terminated(BaseException):
    """SIGTERM or SIGHUP, raised in the main thread so that `finally` clauses run. Like KeyboardInterrupt."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        hangup = number != signal.SIGTERM
        self.what = "the terminal has gone" if hangup else "terminated"
        self.exit_code = EXIT_HANGUP if hangup else EXIT_TERMINATED


def raise_on_sigterm() -> None:
    """For commands that end in order when they are told to: SIGTERM and SIGHUP unwind like Ctrl-C."""

    def raise_terminated(number: int, _: object) -> NoReturn:
        raise Terminated(number)

    signal.signal(signal.SIGTERM, raise_terminated)
    for hangup in hangup_signals():
        signal.signal(hangup, raise_terminated)


def hangup_signals() -> list[signal.Signals]:
    """Those that say that the terminal has gone, where the system has one; not what `nohup` has us ignore."""
    found = [getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    return [number for number in found if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP wait until the block has ended.

    For imports of large packages: one that is cut short can turn the interruption into any other error.
    """
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, *hangup_signals())
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("P2PMOE_DEBUG", "") not in ("", "0")


def run_guarded(command: Callable[[], Any]) -> int:
    """Run `command` and return the exit code; what it raises becomes one line on standard error."""
    try:
        code = command()
        written = finish_streams()
    except (KeyboardInterrupt, typer.Abort):
        return _report("interrupted", EXIT_INTERRUPTED)
    except Terminated as error:
        return _report(error.what, error.exit_code)
    except BrokenPipeError:
        finish_streams()  # whoever read our output has gone: nothing is left to say
        return EXIT_UNEXPECTED
    except SystemExit as error:  # what the parser makes of such a pipe
        finish_streams()
        return error.code if isinstance(error.code, int) else EXIT_UNEXPECTED
    except Exception as error:  # noqa: BLE001 - the last place that can turn it into a line
        return report(error)
    if not written:
        return EXIT_UNEXPECTED
    return code if isinstance(code, int) else 0


def report(error: Exception) -> int:
    """Print the one line that an error becomes, and return its exit code. Never raises."""
    if debugging():
        _print_traceback(error)
    if isinstance(error, P2PMoEError):
        return _report(" ".join([text_of(error), *getattr(error, "__notes__", ())]), error.exit_code)
    if (usage := _usage_message(error)) is not None:
        return _report(usage, EXIT_USAGE) if usage else EXIT_USAGE
    if isinstance(error, OSError):
        return _report(text_of(error), EXIT_UNEXPECTED)
    hint = "" if debugging() else "; run it again with P2PMOE_DEBUG=1 for the traceback, and please report it"
    return _report(f"unexpected {type(error).__name__}: {text_of(error)}{hint}", EXIT_UNEXPECTED)


def need_package(what: str, error: ImportError) -> ConfigError:
    """The error for an optional package that is not installed; `what` needs it."""
    return ConfigError(f"{what} needs {error.name}, which is not installed; run: pip install 'p2pmoe[tasks]'")


def _report(line: str, code: int) -> int:
    complain(f"error: {legible(line)}")
    finish_streams()
    return code


def _print_traceback(error: Exception) -> None:
    try:
        lines = traceback.format_exception(error)
    except Exception:  # noqa: BLE001 - somebody's __str__ or __repr__
        lines = traceback.format_tb(error.__traceback__)
    complain("".join(lines).rstrip())


def _usage_message(error: Exception) -> str | None:
    """The parser's own message, empty when it has printed the help; None for an error that is not the parser's.

    Its exception classes have moved between releases; their methods have not.
    """
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    if not format_message():
        return ""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "p2pmoe"
    return f"{' '.join(format_message().split()).rstrip('.')}; see {command} --help"
