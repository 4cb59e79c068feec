"""What a forked child leaves alone, looked at from both sides. In processes of their own: a fork of pytest is none."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from p2pmoe import forks
from p2pmoe.errors import ClosedError, ForkedError, LocalError

needs_fork = pytest.mark.skipif(not forks.CAN_FORK, reason="this system does not fork")

START = """
import asyncio, gc, os, socket, sys, threading
from p2pmoe import forks
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", START + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_the_error_is_one_of_a_closed_object() -> None:
    error = forks.forked("opened the swarm", "make a new Swarm in the worker")
    assert isinstance(error, ForkedError)
    assert isinstance(error, ClosedError)
    assert isinstance(error, LocalError)
    assert str(error) == "this process was forked from the one that opened the swarm; make a new Swarm in the worker"


@needs_fork
def test_a_child_that_closes_everything_it_inherited_takes_nothing_from_the_parents_loop() -> None:
    """Transports, the loop and its poller are closed in the child; the parent's connection and thread go on."""
    assert (
        run(
            """
        ours, theirs = (forks.shared(end) for end in socket.socketpair())
        loop = forks.new_loop()
        heard = []

        class Reader(asyncio.Protocol):
            def data_received(self, data):
                heard.append(data)
                loop.stop()

        async def connect():
            return (await loop.create_connection(Reader, sock=ours))[0]

        transport = loop.run_until_complete(connect())
        child = os.fork()
        if not child:
            transport.write(b"from the child")
            transport.close()
            loop.close()
            ours.close()
            theirs.close()
            gc.collect()
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        theirs.settimeout(0.05)
        try:
            print("the peer heard", theirs.recv(100))
        except TimeoutError:
            print("the peer heard nothing")
        theirs.send(b"hello")
        loop.call_later(10, loop.stop)
        loop.run_forever()
        transport.write(b"answer")
        print(heard, theirs.recv(100))
        threading.Timer(0.01, loop.call_soon_threadsafe, (loop.stop,)).start()  # the loop can still be woken
        loop.run_forever()
        transport.abort()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        """
        )
        == "the peer heard nothing\n[b'hello'] b'answer'\n"
    )


@needs_fork
def test_a_lock_that_another_thread_held_holds_no_child_up() -> None:
    assert (
        run(
            """
        from p2pmoe.experts.cache import ChildrenCache
        from p2pmoe.client.directory import StaticDirectory
        from p2pmoe.client.standing import Standing
        from p2pmoe.client.swarm import Swarm
        from p2pmoe.errors import ForkedError
        from p2pmoe.rpc.memory import MemoryNetwork, MemoryTransport

        cache, standing = ChildrenCache(lambda: 0.0, max_age_s=1, negative_s=1), Standing(lambda: 0.0)
        options = {"directory": StaticDirectory({}), "transport": MemoryTransport(MemoryNetwork())}
        swarm, idle = Swarm(**options), Swarm(**options)
        swarm.start()
        for lock in (cache._lock, standing._lock, swarm._starting, idle._starting):
            lock.acquire()
        child = os.fork()
        if not child:
            cache.mark_unreachable("alice", 1)
            standing.note("alice", "broken_reply")
            for each in (swarm.start, lambda: swarm.find_experts("ffn.*")):
                try:
                    each()
                except ForkedError:
                    os.write(1, b"ForkedError ")
            swarm.close()
            with idle:  # it was not open at the fork
                os.write(1, repr(idle.find_experts("ffn.*")).encode())
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        swarm._starting.release()
        swarm.close()
        """
        )
        == "ForkedError ForkedError []"
    )


@needs_fork
def test_the_thread_that_forked_has_a_bell_of_its_own_in_the_child() -> None:
    assert (
        run(
            """
        from p2pmoe.rpc.doorbell import thread_doorbell

        bell = thread_doorbell()
        child = os.fork()
        if not child:
            own = thread_doorbell()
            own.ring()
            assert own is not bell and own.wait(5)
            bell.ring()
            bell.close()
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert not bell.wait(0.05), "the child rang it"
        bell.ring()
        print(bell.wait(5))
        """
        )
        == "True\n"
    )


@needs_fork
def test_a_child_without_a_free_descriptor_says_nothing_to_the_peer_either() -> None:
    assert (
        run(
            """
        import resource

        ours, theirs = (forks.shared(end) for end in socket.socketpair())
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        child = os.fork()
        if not child:
            assert ours.fileno() == theirs.fileno() == -1
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        theirs.send(b"x")
        print(ours.recv(1))
        """
        )
        == "b'x'\n"
    )


@needs_fork
def test_one_that_raises_when_it_is_told_does_not_keep_the_others_from_hearing() -> None:
    program = """
        class One:
            def became_a_child(self):
                os.write(1, b"told ")
                if self is bad:
                    raise ValueError("no")

        bad, good, gone = One(), One(), One()
        for each in (bad, good, gone):
            forks.tell(each)
        del gone, each
        sys.excepthook = lambda kind, error, trace: os.write(1, f"{error} ".encode())
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """
    assert sorted(run(program).split()) == ["no", "told", "told"]
