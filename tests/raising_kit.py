"""Exceptions of a user's code that are hard to speak of, and what is said of each."""

from __future__ import annotations


class Mute(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Leaving(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class Nothing(Exception):  # noqa: N818
    def __str__(self) -> str:
        return None  # type: ignore[return-value]  # noqa: PLE0307


class Words(str):
    __slots__ = ()

    def __getitem__(self, key: object) -> str:
        raise RuntimeError("no slices")

    isprintable = splitlines = strip = __len__ = __getitem__  # type: ignore[assignment]


class Worded(Exception):  # noqa: N818
    def __str__(self) -> str:
        return Words("some words")


class Endless(Exception):  # noqa: N818
    def __str__(self) -> str:
        return str(self)


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no name")


class Masked(Exception, metaclass=Nameless):  # noqa: N818
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise RuntimeError("no class")


def grouped(depth: int) -> BaseException:
    error: Exception = ValueError("inmost")
    for level in range(depth):
        error = ExceptionGroup(f"level {level}", [error])
    return error


HOSTILE = {
    "mute": (Mute(), "Mute"),
    "leaving": (Leaving(), "Leaving"),
    "nothing": (Nothing(), "Nothing"),
    "worded": (Worded(), "Worded: some words"),
    "endless": (Endless(), "Endless"),
    "masked": (Masked("hidden"), "Masked: hidden"),
    "surrogate": (ValueError("a\ud800b"), "ValueError: a\ufffdb"),
    "control": (ValueError("a\x1b[31m\x00b"), "ValueError: a\ufffd[31m\ufffdb"),
    "lines": (ValueError("\n first\nsecond"), "ValueError: first"),
    "megabytes": (ValueError("x" * 10**7), "ValueError: " + "x" * 487 + "…"),
    "odd name": (type("a\x1b\nb" + "c" * 1000, (Exception,), {})("t"), "a\ufffd\ufffdb" + "c" * 96 + ": t"),
    "empty": (KeyboardInterrupt(), "KeyboardInterrupt"),
    "stop": (StopIteration(3), "StopIteration: 3"),
    "group": (
        grouped(1),
        "ExceptionGroup: level 0 (1 sub-exception): ValueError: inmost",
    ),
    "deep group": (
        grouped(500),
        "ExceptionGroup: level 499 (1 sub-exception): ExceptionGroup: level 498 (1 sub-exception): "
        "ExceptionGroup: level 497 (1 sub-exception)",
    ),
}
