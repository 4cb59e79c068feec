"""hivemind's `nop` expert under 64 callers; runs in an environment of its own: `python hivemind_nop.py REPEATS`."""

import json
import statistics
import sys
import threading
import time

import torch
from hivemind import DHT
from hivemind.moe import get_experts
from hivemind.moe.server import background_server


def main() -> None:
    with background_server(
        expert_uids=["expert.0"], expert_cls="nop", hidden_dim=1024, num_handlers=8, optim_cls=None, device="cpu"
    ) as info:
        dht = DHT(initial_peers=info.addrs, start=True)
        (expert,) = get_experts(dht, ["expert.0"])
        x, rates = torch.randn(4, 1024), []
        for repeat in range(int(sys.argv[1]) + 1):
            counts, stop = [0] * 64, threading.Event()

            def call(index, counts=counts, stop=stop):
                with torch.no_grad():
                    while not stop.is_set():
                        expert(x)
                        counts[index] += 1

            threads = [threading.Thread(target=call, args=(index,)) for index in range(64)]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            time.sleep(1.5 if repeat else 0.5)
            done, took = sum(counts), time.perf_counter() - begin
            stop.set()
            for thread in threads:
                thread.join()
            if repeat:
                rates.append(done / took)
        print(json.dumps({"calls_per_s": round(statistics.median(rates), 1)}))
        dht.shutdown()


if __name__ == "__main__":
    main()
