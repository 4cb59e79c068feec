"""An honest client in a process of its own: calls steadily, and says how long the calls took.

`python -m attacks.honest JSON`, then one command a line on standard input and one JSON line back for each:
`begin` starts a window of measurements, `end` reports it, `probe` answers with the digest of a fixed question and
pauses until the next `begin`, so that whoever asks may count updates. It ends when its standard input is closed.
"""

from __future__ import annotations

import hashlib
import json
import queue
import statistics
import sys
import threading
import time
from typing import Any

PAUSE_S = 0.004
BACKWARD_EVERY = 10
TIMEOUT_S = 10.0


class Window:
    """What happened since `begin`."""

    def __init__(self) -> None:
        self.forward_s: list[float] = []
        self.backward_s: list[float] = []
        self.errors: list[str] = []

    def report(self) -> dict[str, Any]:
        ordered = sorted(self.forward_s)
        return {
            "calls": len(ordered) + len(self.backward_s),
            "p50_ms": round(1e3 * statistics.median(ordered), 3) if ordered else None,
            "p99_ms": round(1e3 * ordered[int(0.99 * (len(ordered) - 1))], 3) if ordered else None,
            "errors": len(self.errors),
            "error": self.errors[0] if self.errors else "",
        }


def serve(spec: dict[str, Any]) -> None:
    import torch

    import p2pmoe
    from p2pmoe.errors import P2PMoEError
    from p2pmoe.identity import SwarmKey

    torch.set_num_threads(1)
    commands: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
    path = spec["swarm_key_path"]
    swarm_key = SwarmKey.load(path) if path else None
    with p2pmoe.Swarm(initial_peers=spec["initial_peers"], swarm_id=spec["swarm_id"], swarm_key=swarm_key) as swarm:
        mine = swarm.expert(spec["honest_uid"], forward_timeout_s=TIMEOUT_S, backward_timeout_s=TIMEOUT_S)
        untouched = swarm.expert(spec["untouched_uid"], forward_timeout_s=TIMEOUT_S)
        generator = torch.Generator().manual_seed(spec["seed"])
        inputs = tuple(torch.randn((1, *proto.shape), generator=generator) for proto in mine.info.inputs)
        gradients = tuple(torch.full((1, *proto.shape), 1e-3) for proto in mine.info.outputs)
        question = tuple(torch.randn((2, *proto.shape), generator=generator) for proto in untouched.info.inputs)
        window, updates, turn, paused = Window(), 0, 0, True
        _say({"ready": True})
        while True:
            try:
                command = commands.get(timeout=None if paused else PAUSE_S)
            except queue.Empty:
                command = ""
            if command == "stop":
                return
            if command == "begin":
                window, paused = Window(), False
                _say({"updates": updates})
            elif command == "end":
                _say({**window.report(), "updates": updates})
            elif command == "probe":
                paused = True
                _say({"digest": _digest(untouched, question), "updates": updates})
                continue
            turn += 1
            began = time.perf_counter()
            try:
                if turn % BACKWARD_EVERY:
                    with torch.no_grad():
                        mine(*inputs)
                    window.forward_s.append(time.perf_counter() - began)
                else:
                    mine.call_backward(inputs, gradients)
                    window.backward_s.append(time.perf_counter() - began)
                    updates += 1
            except P2PMoEError as error:
                window.errors.append(f"{type(error).__name__}: {error}")
                window.forward_s.append(time.perf_counter() - began)


def _digest(expert: Any, question: tuple[Any, ...]) -> str:
    import torch

    from p2pmoe.errors import P2PMoEError

    try:
        with torch.no_grad():
            outputs = expert(*question)
    except P2PMoEError as error:
        return f"{type(error).__name__}: {error}"
    flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in flat)).hexdigest()


def _read_commands(commands: queue.Queue[str]) -> None:
    for line in sys.stdin:
        commands.put(line.strip())
    commands.put("stop")


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    from p2pmoe.cli.process import prepare_process

    prepare_process()
    serve(json.loads(sys.argv[1]))
