"""p2pmoe: train a huge mixture of experts through strangers' machines.

Names are imported when they are first used: `p2pmoe lookup` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pmoe.client.mixture import RemoteMixtureOfExperts
    from p2pmoe.client.remote_expert import RemoteExpert
    from p2pmoe.client.swarm import Swarm
    from p2pmoe.client.switch import RemoteSwitchMixtureOfExperts
    from p2pmoe.config import NodeConfig
    from p2pmoe.errors import P2PMoEError
    from p2pmoe.experts.directory import ExpertRecord
    from p2pmoe.identity import Identity, SwarmKey
    from p2pmoe.node import Node, background_node
    from p2pmoe.protocol.nested import nested_compare, nested_flatten, nested_map, nested_pack
    from p2pmoe.protocol.schema import BatchTensorProto
    from p2pmoe.server.backend import ExpertBackend
    from p2pmoe.server.layers import register_expert_class
    from p2pmoe.server.runtime import Runtime
    from p2pmoe.server.task_pool import TaskPool
    from p2pmoe.types import Endpoint

__version__ = "0.1.0"

_HOMES = {
    "BatchTensorProto": "protocol.schema",
    "Endpoint": "types",
    "ExpertBackend": "server.backend",
    "ExpertRecord": "experts.directory",
    "Identity": "identity",
    "Node": "node",
    "NodeConfig": "config",
    "P2PMoEError": "errors",
    "RemoteExpert": "client.remote_expert",
    "RemoteMixtureOfExperts": "client.mixture",
    "RemoteSwitchMixtureOfExperts": "client.switch",
    "Runtime": "server.runtime",
    "Swarm": "client.swarm",
    "SwarmKey": "identity",
    "TaskPool": "server.task_pool",
    "background_node": "node",
    "nested_compare": "protocol.nested",
    "nested_flatten": "protocol.nested",
    "nested_map": "protocol.nested",
    "nested_pack": "protocol.nested",
    "register_expert_class": "server.layers",
}

__all__ = [
    "BatchTensorProto",
    "Endpoint",
    "ExpertBackend",
    "ExpertRecord",
    "Identity",
    "Node",
    "NodeConfig",
    "P2PMoEError",
    "RemoteExpert",
    "RemoteMixtureOfExperts",
    "RemoteSwitchMixtureOfExperts",
    "Runtime",
    "Swarm",
    "SwarmKey",
    "TaskPool",
    "background_node",
    "nested_compare",
    "nested_flatten",
    "nested_map",
    "nested_pack",
    "register_expert_class",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'p2pmoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"p2pmoe.{home}"), name)  # noqa: TID251 - from the table above
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
