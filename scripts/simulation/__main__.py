"""`scripts/simulate`: one JSON line for each size of network, then one with the growth, and a plot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from simulation.experiment import Conditions, simulate
from simulation.growth import fit, plot

NODES = (100, 300, 1000, 3000, 10_000, 20_000)
FITTED = ("hops", "requests", "p50_ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate", description="Example: scripts/simulate --nodes 100 1000 --plot runs/dht.png"
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES), help="sizes of the network")
    parser.add_argument("--lookups", type=int, default=500, help="records put and read in each size")
    parser.add_argument("--loss", type=float, default=0.02, help="share of the datagrams that get lost")
    parser.add_argument("--mean-life", type=float, default=600.0, metavar="SECONDS", help="of a node; 0: for ever")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, default=Path("runs/simulation.png"), metavar="PNG")
    options = parser.parse_args()
    if min(options.nodes) < 4 or options.lookups < 1 or not 0 <= options.loss < 1 or options.mean_life < 0:
        parser.error("at least 4 nodes, 1 look-up, a loss in 0..1 and a mean life of at least 0 s are needed")
    conditions = Conditions(options.loss, options.mean_life, options.lookups, options.seed)
    rows = []
    for count in sorted(options.nodes):
        rows.append(simulate(count, conditions))
        settings = {"loss": options.loss, "mean_life_s": options.mean_life, "seed": options.seed}
        print(json.dumps({**rows[-1], **settings}), flush=True)
    fits = {}
    if len(rows) > 2:
        sizes = [row["nodes"] for row in rows]
        fits = {name: fit(sizes, [row[name] for row in rows]) for name in FITTED}
        print(json.dumps({"growth": fits, "of": "log2(nodes)"}), flush=True)
    plot(rows, fits, options.plot)
    print(json.dumps({"plot": str(options.plot)}), flush=True)


if __name__ == "__main__":
    main()
