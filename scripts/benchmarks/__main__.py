"""`scripts/bench [CASE …]`: JSON lines, one a case and shape."""

from __future__ import annotations

import argparse
import json
import platform

import torch

from benchmarks import beam, dht, tensor_path, tls


def emit(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


def main() -> None:
    tensor_cases = ("nop_latency", "nop_concurrency", "ffn_against_local", "ffn_concurrency", "mixture", "memory")
    cases = (*tensor_cases, "tls", "dht", "beam")
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Example: scripts/bench mixture --repeats 5")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"any of {', '.join(cases)}; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where the server's experts are, e.g. cuda")
    parser.add_argument("--hivemind-python", help="a Python that has hivemind, for the side-by-side case")
    options = parser.parse_args()
    for case in options.cases:
        if case not in cases:
            parser.error(f"unknown case {case!r}; known: {', '.join(cases)}")
    emit(case="machine", python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads())
    for case in options.cases or cases:
        if case in {"dht", "beam"}:
            measure = dht.dht if case == "dht" else beam.beam
            measure(emit, options.repeats, options.hivemind_python)
            continue
        if case == "tls":
            tls.tls(emit, options.repeats, options.device)
            continue
        extra = {"hivemind": options.hivemind_python} if case == "nop_concurrency" else {}
        getattr(tensor_path, case)(emit, options.repeats, options.device, **extra)


if __name__ == "__main__":
    main()
