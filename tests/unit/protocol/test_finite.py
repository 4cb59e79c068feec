"""Finiteness by norms: exact where it says yes, and cheap: no thread is woken for it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from swarm_kit import threads_woken_by

from p2pmoe.protocol.finite import SMALL, all_surely_finite, quick_norm

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, SMALL), (257, 300)])
def test_it_is_the_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    wide = torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()
    assert quick_norm(tensor) == pytest.approx(wide.square().sum().sqrt().item(), rel=1e-3)
    if len(shape) > 1:
        assert quick_norm(tensor.T) == pytest.approx(quick_norm(tensor), rel=1e-3)
    assert quick_norm(tensor.requires_grad_()) == quick_norm(tensor.detach())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, SMALL - 1, SMALL, 3 * SMALL])
def test_one_bad_value_makes_it_bad(dtype: torch.dtype, bad: float, index: int) -> None:
    tensor = torch.ones(3 * SMALL + 1, dtype=dtype)
    assert math.isfinite(quick_norm(tensor))
    tensor[index] = bad
    assert not math.isfinite(quick_norm(tensor))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize(
    "look",
    [
        "quick_norm(large)",
        "quick_norm(large.view(2048, 1024).T)",
        "quick_norm(wide)",
        "quick_norm(halves)",
        "all_surely_finite(small)",
        "merge(batch)",
    ],
)
def test_no_team_of_threads_is_woken(look: str) -> None:
    """It takes longer to wake than all that is to be done here, and spins on cores where others compute."""
    prepare = (
        "from types import SimpleNamespace as S\n"
        "from p2pmoe.protocol.finite import SMALL, all_surely_finite, quick_norm\n"
        "from p2pmoe.server.devices import merge\n"
        "small, halves, wide = [torch.ones(SMALL - 1) for _ in range(8)], large.half(), large.double()\n"
        "batch = S(tasks=[S(tensors=(torch.ones(rows, 1024),)) for rows in (4, 31, 4, 1, 20, 4, 4)])"
    )
    assert threads_woken_by(prepare, look) == "0 True\n"


def test_many_at_once() -> None:
    small = [torch.ones(3, 4) for _ in range(5)]
    assert all_surely_finite([*small, torch.ones(2, dtype=torch.int64)])
    small[3][1, 2] = math.nan
    assert not all_surely_finite(small)
