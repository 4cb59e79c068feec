"""`p2pmoe` commands as processes, with every wait bounded."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Self

import psutil

TIMEOUT_S = 40.0


class Command:
    """One running command. Its output is read line by line; leaving `with` kills what is still there."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("P2PMOE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "p2pmoe", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=inherited | environ,
            text=True,
            start_new_session=os.name != "nt",
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.stdout, self.stderr = Lines(self.process.stdout), Lines(self.process.stderr)
        self._family: list[psutil.Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        family = self.children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        for child in [*family, *self._family]:
            if child.is_running():
                child.kill()
        if error is not None:  # pytest shows it with the failure
            print(f"standard output:\n{self.stdout.wait_for_end()}\nstandard error:\n{self.stderr.wait_for_end()}")
        self.stdout.close()
        self.stderr.close()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def children(self) -> list[psutil.Process]:
        """The processes below this one, now; they are remembered."""
        self._family = psutil.Process(self.process.pid).children(recursive=True)
        return self._family

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code, when all it wrote has been read."""
        code = self.process.wait(timeout_s)
        self.stdout.wait_for_end()
        self.stderr.wait_for_end()
        return code


class Lines:
    """Lines of a pipe as they come."""

    def __init__(self, pipe: IO[str]) -> None:
        self.seen: list[str] = []
        self._pipe = pipe
        self._queue: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def next(self, timeout_s: float = TIMEOUT_S) -> str:
        """The next line, empty at the end."""
        line = self._queue.get(timeout=timeout_s)
        self.seen.append(line)
        return line

    def wait_for(self, part: str) -> str:
        """The next line with `part` in it."""
        while part not in (line := self.next()):
            assert line, f"the end came before {part!r}: {''.join(self.seen)}"
        return line

    def wait_for_end(self) -> str:
        """All that is left; it is in `text` too."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        while not self._queue.empty():
            self.seen.append(self._queue.get_nowait())
        return self.text

    @property
    def text(self) -> str:
        return "".join(self.seen)

    def close(self) -> None:
        self._thread.join(TIMEOUT_S)
        self._pipe.close()

    def _read(self) -> None:
        for line in self._pipe:
            self._queue.put(line)
        self._queue.put("")


def run_command(*arguments: str, **environ: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    with Command(*arguments, **environ) as command:
        code = command.wait()
        return code, command.stdout.text, command.stderr.text


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """For what happens in another process and tells nobody."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def all_gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether every one of these has ended; a zombie has."""
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)
