"""A process with DHT nodes in it, for the integration tests. Arguments: JSON. Says where it listens, ends with stdin.

Every line on its standard input is a JSON command; every answer is one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import sys

from p2pmoe.config import DHTConfig
from p2pmoe.dht.addresses import bind
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.server import SwarmServer
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.identity import Identity
from p2pmoe.types import Endpoint


async def main(options: dict) -> None:
    identity = Identity.load_or_create(options["key"]) if options.get("key") else Identity.generate()
    config = DHTConfig(port=options.get("port", 0), initial_peers=tuple(options.get("initial_peers", ())))
    node = DHTNode(identity, config, client_mode=options.get("client", False))
    await node.astart()
    directory = ExpertDirectory(node)
    crowd = [await _crowd_member(node.address) for _ in range(options.get("crowd", 0))]
    print(json.dumps({"peer_id": node.peer_id, "dht_address": node.dht_address, "crowd": len(crowd)}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await _obey(directory, **json.loads(line))), flush=True)
    for member in crowd:
        await member.close()
    await node.aclose()


async def _crowd_member(address: tuple[str, int]) -> SwarmServer:
    member = SwarmServer(Identity.generate().node_id, DHTConfig().swarm_id)
    await member.open(bind("127.0.0.1", 0))
    assert await member.bootstrap([address])
    return member


async def _obey(directory: ExpertDirectory, command: str, **arguments) -> object:
    if command == "declare":
        endpoint = Endpoint("127.0.0.1", arguments["port"])
        await directory.declare(arguments["schemas"], endpoint, arguments["ttl_s"])
        return True
    if command == "withdraw":
        await directory.withdraw(arguments["uids"])
        return True
    directory.invalidate()
    found = await directory.find_experts(arguments["pattern"])
    return sorted([record.uid, record.peer_id, record.endpoint.port] for record in found)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
