"""Time-outs as people write them: for ever, none, and what is no number of seconds."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from swarm_kit import World, grid_backends, open_world

import p2pmoe
from p2pmoe.client.directory import StaticDirectory
from p2pmoe.client.patience import MAX_TIMEOUT_S, as_timeout
from p2pmoe.errors import ConfigError

NONE: list[Any] = [math.nan, -1, -math.inf, "5", None, torch.tensor(5.0), 1j]
LAYERS: dict[str, Callable[..., Any]] = {
    "expert": lambda world, **options: world.swarm.expert("ffn.0.0", **options),
    "mixture": lambda world, **options: world.mixture(k_best=4, k_min=4, **options),
}


def test_what_a_timeout_may_be() -> None:
    for given, seconds in ((0, 0.0), (5, 5.0), (0.5, 0.5), (np.float32(2), 2.0), (1e300, MAX_TIMEOUT_S)):
        assert as_timeout("timeout_s", given) == seconds
    assert as_timeout("timeout_s", math.inf) == MAX_TIMEOUT_S


@pytest.mark.parametrize("bad", NONE, ids=repr)
def test_what_is_no_timeout_is_refused_where_it_is_said(bad: Any) -> None:
    """NaN was told as a blocked event loop at the first call, None as a TypeError in the backward pass."""
    with open_world({"alice": []}) as world:
        for kind, make in LAYERS.items():
            names = ["forward_timeout_s", "backward_timeout_s"]
            if kind == "mixture":
                names += ["search_timeout_s", *([] if bad is None else ["timeout_after_k_min_s"])]
            for name in names:
                with pytest.raises(ConfigError, match=f"^{name} must be seconds, 0 or more"):
                    make(world, **{name: bad})
    with pytest.raises(ConfigError, match=r"^timeout_s must be seconds"):
        p2pmoe.Swarm(directory=StaticDirectory({}), timeout_s=bad)


@pytest.mark.parametrize("carrier", ["memory", "http"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("seconds", [math.inf, 1e12])
def test_for_ever(carrier: str, kind: str, seconds: float) -> None:
    """It was an OverflowError of whatever waits."""

    def run(world: World) -> None:
        layer = LAYERS[kind](world, forward_timeout_s=seconds, backward_timeout_s=seconds)
        for call in (layer, lambda x: asyncio.run(layer.acall(x))):
            x = torch.randn(3, 4, requires_grad=True)
            call(x).sum().backward()
            assert x.grad is not None
            assert x.grad.any()

    with open_world(
        {"alice": grid_backends([0]), "bob": grid_backends([1])}, carrier=carrier, timeout_s=seconds
    ) as world:
        run(world)
