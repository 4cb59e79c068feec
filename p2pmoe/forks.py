"""What a forked child must leave alone: its parent's connections and pollers. Knows descriptors; nothing of their use.

A fork copies every descriptor, and no thread but the one that forked. Data loaders do so beside a training swarm.

Rules:
1. In the child, before the fork returns to anybody, the listed descriptors lead to the null device. So nothing that the
   child does, or that is finalized in it, reaches the parent's peers: no byte, no TLS goodbye, no shutdown. And nothing
   reaches the parent's pollers, which parent and child would share: a child that closes its copy of a connection
   would take it out of the parent's poller, and the parent would wait for its answers for ever.
2. Objects that live on threads are told, so that they refuse their use in the child with `ForkedError`, and so that
   locks that another thread held at that moment are made anew.
3. The parent does nothing and notices nothing.

Where a system cannot fork nothing is done.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from p2pmoe.errors import ForkedError


class _HasFileno(Protocol):
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Inherited(Protocol):
    """An object that a forked child may find itself with."""

    def became_a_child(self) -> None:
        """This is another process than a moment ago: no thread runs but the calling one. Must not block or raise."""


F = TypeVar("F", bound=_HasFileno)
_descriptors: weakref.WeakSet[Any] = weakref.WeakSet()
_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
_hearers: weakref.WeakSet[Inherited] = weakref.WeakSet()
_functions: list[Callable[[], None]] = []
_kept: list[object] = []  # in a child: nobody shall finalize them one by one
CAN_FORK: Final = hasattr(os, "register_at_fork")


def shared(owner: F) -> F:
    """List a socket or selector whose descriptor a child must not use; gives it back. It is held weakly."""
    _descriptors.add(owner)
    return owner


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop for a thread of ours, whose poller is listed."""
    if not CAN_FORK:
        return asyncio.new_event_loop()
    return new_selector_loop()


def new_selector_loop() -> asyncio.AbstractEventLoop:
    """The same, and the loop waits with a selector on every system."""
    selector = selectors.DefaultSelector()
    if hasattr(selector, "fileno"):
        shared(selector)
    loop = asyncio.SelectorEventLoop(selector)
    _loops.add(loop)
    return loop


def tell(hearer: Inherited) -> None:
    """Call its `became_a_child` in every forked child. It is held weakly."""
    _hearers.add(hearer)


def tell_module(function: Callable[[], None]) -> None:
    """The same for a function of a module."""
    _functions.append(function)


def forked(what: str, remedy: str) -> ForkedError:
    """The error of an object that belongs to the parent."""
    return ForkedError(f"this process was forked from the one that {what}; {remedy}")


def _in_child() -> None:
    _kept.extend([*_descriptors, *_loops])
    _cut_off(list(_descriptors))
    _descriptors.clear()
    for loop in list(_loops):
        loop.set_exception_handler(_say_nothing)  # what is finalized in the child is the parent's business
    _loops.clear()
    for tell_one in [*_functions, *(hearer.became_a_child for hearer in list(_hearers))]:
        try:
            tell_one()
        except Exception as error:  # noqa: BLE001 - the others must be told, and whoever forked goes on
            sys.excepthook(type(error), error, error.__traceback__)


def _cut_off(owners: list[Any]) -> None:
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # no descriptor is free: their own closing sends nothing either
        null = -1
    for owner in owners:
        try:
            descriptor = owner.fileno()
            if null < 0:
                owner.close()
            elif descriptor >= 0:
                os.dup2(null, descriptor, inheritable=False)
        except (OSError, ValueError):
            pass
    if null >= 0:
        os.close(null)


def _say_nothing(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """In the place of a line in the log."""


if CAN_FORK:
    os.register_at_fork(after_in_child=_in_child)
