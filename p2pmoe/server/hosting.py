"""Builds the experts that `[experts]` asks for. Knows config sections and modules; nothing of calls or peers."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from p2pmoe.config import BatchingConfig, ExpertsConfig, LimitsConfig, OptimizerConfig
from p2pmoe.errors import ConfigError, describe
from p2pmoe.experts.declarations import ANY_DIGEST, check_announceable
from p2pmoe.experts.uid import expand_patterns, first_repeated
from p2pmoe.protocol.nested import nested_flatten
from p2pmoe.protocol.schema import BatchTensorProto
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.birth import Origin
from p2pmoe.server.layers import make_expert
from p2pmoe.server.optimizers import make_optimizer
from p2pmoe.server.shared_trials import SharedTrials
from p2pmoe.server.trial import materialize
from p2pmoe.server.user_files import import_file


def make_backends(
    experts: ExpertsConfig, batching: BatchingConfig, optimizer: OptimizerConfig, devices: Sequence[str]
) -> list[ExpertBackend]:
    """One backend a uid, dealt to the devices in turn.

    Raises:
        InvalidUidError: a pattern breaks the grammar.
        ConfigError: the kind, its options, the optimizer or a device is wrong, a uid is named twice, or so many are
            named that they cannot be announced.
    """
    for name in experts.modules:
        _import(name)
    uids = expand_patterns(experts.uids)
    if (twice := first_repeated(uids)) is not None:
        raise ConfigError(f"experts.uids: {twice} is named twice")
    check_announceable(dict.fromkeys(uids, ANY_DIGEST))  # before thousands of modules are made for nothing
    options = {
        "max_batch_size": batching.max_batch_size,
        "min_batch_size": batching.min_batch_size,
        "max_queue_delay_ms": batching.max_queue_delay_ms,
        "max_queue_size": batching.max_queue_size,
        "priority": batching.priority,
    }
    backends, trials = [], SharedTrials()
    for index, uid in enumerate(uids):
        # Without a seed each draws on from where the last one stopped: from one state all would begin alike.
        with torch.random.fork_rng(devices=[], enabled=experts.seed is not None):
            if experts.seed is not None:
                torch.manual_seed(_seed_of(experts.seed, uid))
            module, args_schema, kwargs_schema = make_expert(experts.kind, experts.hidden_dim, experts.options)
            materialize(uid, module, (args_schema, kwargs_schema))
        device = devices[index % len(devices)]
        module = _to_device(module, device)
        trained = make_optimizer(module.parameters(), optimizer)
        backend = ExpertBackend(
            uid,
            module,
            trained,
            args_schema=args_schema,
            kwargs_schema=kwargs_schema,
            device=device,
            trials=trials,
            **options,
        )
        backend.birth.origin = Origin(experts.kind, experts.hidden_dim, dict(experts.options))
        backends.append(backend)
    return backends


def check_limits(backends: Iterable[ExpertBackend], limits: LimitsConfig) -> None:
    """Raises ConfigError for an expert whose every call would be refused: one row of it is over a limit already."""
    for backend in {backend.schema_digest: backend for backend in backends}.values():
        protos: tuple[BatchTensorProto, ...] = nested_flatten(backend.backward_schema)
        elements = [math.prod(_least_shape(proto)) for proto in protos]
        for key, needed, what in (
            ("max_tensors", len(protos), "tensors"),
            ("max_rank", max(1 + len(proto.shape) for proto in protos), "dimensions"),
            ("max_elements", max(elements), "numbers in one tensor"),
            (
                "max_body_bytes",
                sum(count * proto.dtype.itemsize for count, proto in zip(elements, protos, strict=True)),
                "bytes",
            ),
        ):
            limit = getattr(limits, key)
            if needed > limit:
                raise ConfigError(
                    f"{backend.name}: a backward call of one row has {needed} {what}, limits.{key} = {limit} allows "
                    f"fewer: every call would be refused; raise the limit or make the expert smaller"
                )


def _least_shape(proto: BatchTensorProto) -> tuple[int, ...]:
    return tuple(size or 1 for size in proto.shape)


def _to_device(module: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        return module.to(torch.device(name))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"devices: {name!r} cannot be used: {describe(error)}; devices = ['cpu'] always works"
        ) from error


def _seed_of(seed: int, uid: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{uid}".encode()).digest()[:7], "big")


def _import(name: str) -> None:
    """A module of the node's owner, by dotted name or by path; it calls `register_expert_class`."""
    try:
        if name.endswith(".py"):
            import_file(Path(name))
        else:
            importlib.import_module(name)  # noqa: TID251 - the owner names it in node.toml
    except ConfigError:
        raise
    except Exception as error:  # the module's own code may raise anything
        raise ConfigError(f"experts.modules: {name} cannot be imported: {describe(error)}") from error
