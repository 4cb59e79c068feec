"""A node to which the system gives few descriptors or no more memory: refusals in words, neighbours go on."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_processes import wait_until
from frame_kit import call_bytes, result_frames
from swarm_kit import trusting_context

from p2pmoe.config import parse_host_port
from p2pmoe.protocol.messages import RequestParameters

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it counts what Linux counts"),
]
STARVE = """
import resource, runpy, sys, threading
def starve():
    sys.stdin.readline()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 48 * 2**20, resource.RLIM_INFINITY))
    print("starved", flush=True)
threading.Thread(target=starve, daemon=True).start()
sys.argv = ["p2pmoe", "node", "--experts", "ffn.0", "--hidden-dim", "64", "--json", "--torch-threads", "1"]
runpy.run_module("p2pmoe", run_name="__main__")
"""


@pytest.fixture
def starving() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A node that serves, and where."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("P2PMOE_")}
    with subprocess.Popen(
        [sys.executable, "-c", STARVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | {"MALLOC_ARENA_MAX": "1"},
    ) as node:
        try:
            assert node.stdout is not None
            yield node, json.loads(node.stdout.readline())["endpoint"]
        finally:
            node.kill()


def exchange(endpoint: str, body: bytes) -> dict[str, int]:
    """The code of every call in a body."""
    raw = socket.create_connection(parse_host_port(endpoint.removeprefix("https://")), timeout=30)
    with trusting_context().wrap_socket(raw) as connection:
        connection.sendall(b"POST /p2pmoe/v1/exchange HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, frames = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200"), head
    return {frame.header.id: frame.header.code for frame in result_frames(frames)}


def call(name: str, rows: int) -> bytes:
    return call_bytes(torch.ones(rows, 64), id=name, model_name="ffn.0", parameters=RequestParameters())


def test_a_node_without_memory_refuses_what_needs_it_and_serves_the_rest(
    starving: tuple[subprocess.Popen[str], str],
) -> None:
    node, endpoint = starving
    assert exchange(endpoint, call("before", 4)) == {"before": 200}
    assert node.stdin is not None
    assert node.stdout is not None
    node.stdin.write("now\n")
    node.stdin.flush()
    assert node.stdout.readline() == "starved\n"

    assert exchange(endpoint, call("large", 300_000)) == {"large": 503}
    assert exchange(endpoint, call("a", 4) + call("large", 300_000) + call("b", 4)) == {
        "a": 200,
        "large": 503,
        "b": 200,
    }
    assert exchange(endpoint, call("after", 4)) == {"after": 200}

    node.terminate()
    assert node.wait(30) == 0
    assert node.stderr is not None
    said = node.stderr.read()
    assert "Traceback" not in said, said


def is_served(endpoint: str) -> bool:
    try:
        return exchange(endpoint, call("after", 4)) == {"after": 200}
    except ConnectionError:  # as fast as the crowd came, as long new connections are refused
        return False


def test_a_node_with_few_descriptors_says_so_and_outlives_a_crowd() -> None:
    line = f"ulimit -n 64; exec {shlex.quote(sys.executable)} -m p2pmoe node --experts ffn.0 --hidden-dim 64 --json"
    with subprocess.Popen(
        ["/bin/sh", "-c", line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as node:
        try:
            assert node.stdout is not None
            endpoint = json.loads(node.stdout.readline())["endpoint"]
            address = parse_host_port(endpoint.removeprefix("https://"))
            crowd = [socket.create_connection(address, timeout=10) for _ in range(100)]
            for each in crowd:
                each.close()
            wait_until(lambda: is_served(endpoint))
            node.terminate()
            assert node.wait(30) == 0
            assert node.stderr is not None
            said = node.stderr.read().splitlines()
            assert sum("this process may have 64 files open: at most" in each for each in said) == 1
            assert len(said) < 8, said
        finally:
            node.kill()
