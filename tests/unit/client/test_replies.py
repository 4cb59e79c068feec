"""The check for finite numbers: exact, cheap, and fair about whose fault it is."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swarm_kit import threads_woken_by

from p2pmoe import BatchTensorProto as P
from p2pmoe.client.replies import blames_the_node, check_finite, check_finite_async, is_finite, is_finite_async

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=16), max_size=20))
def test_it_says_what_looking_at_every_number_says(dtype: torch.dtype, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    assert is_finite((tensor,)) == all(map(math.isfinite, tensor.double().tolist()))
    assert asyncio.run(is_finite_async((tensor,))) == is_finite((tensor,))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    tensor = torch.full((100, 3), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite((tensor,))
    assert is_finite((-tensor, tensor.requires_grad_()))
    for bad in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            tensor[99, 2] = bad
        assert not is_finite((torch.ones(1), tensor))


def test_opposite_infinities_do_not_cancel() -> None:
    assert not is_finite((torch.tensor([math.inf, -math.inf, 1.0]),))


def test_integers_have_no_say() -> None:
    assert is_finite((torch.tensor([2**62]), torch.tensor([True]), torch.zeros(0)))


def test_a_large_tensor_is_looked_at_to_its_end_without_stopping_the_loop() -> None:
    async def check(tensor: torch.Tensor) -> tuple[bool, int]:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        result = await is_finite_async((tensor,))
        counting.cancel()
        return result, turns

    tensor = torch.zeros(1024, 1000)
    finite, turns = asyncio.run(check(tensor))
    assert finite
    assert turns >= 15
    tensor[-1, -1] = math.nan
    assert asyncio.run(check(tensor))[0] is False


@pytest.mark.parametrize(
    ("sent", "proto", "blamed"),
    [
        (torch.ones(2, 4), P(4), True),
        (torch.full((2, 4), 1e4), P(4), True),
        (torch.full((2, 4), 1e5), P(4), False),
        (torch.full((2, 4), math.nan), P(4), False),
        (torch.full((2, 4), 10**9), P(4), True),
        (torch.zeros(2, 0), P(4), True),
        (torch.ones(2, 4), P(4, codec="fp16"), False),
        (torch.ones(2, 4), P(4, dtype=torch.float16), False),
        (torch.ones(2, 4), P(4, codec="bf16"), True),
    ],
)
def test_whose_fault_it_is(sent: torch.Tensor, proto: P, blamed: bool) -> None:
    sent = sent.long() if (sent == 10**9).any() else sent
    assert blames_the_node((sent,), (proto,)) == blamed


async def test_garbage_in_garbage_out_unless_strict() -> None:
    bad = torch.tensor([[math.nan]])
    good = torch.ones(1, 1)
    assert check_finite("alice", (good,), (bad,), (P(1),)) is None
    assert check_finite("alice", (bad,), (bad,), (P(1),)) is None
    assert await check_finite_async("alice", (bad,), (bad,), (P(1),)) is None
    for error in (
        check_finite("alice", (bad,), (good,), (P(1),)),
        await check_finite_async("alice", (bad,), (good,), (P(1),)),
    ):
        assert error is not None
        assert error.is_evidence
    strict = check_finite("alice", (bad,), (bad,), (P(1),), strict=True)
    assert strict is not None
    assert not strict.is_evidence


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_a_look_at_a_large_reply_wakes_no_team_of_threads() -> None:
    """Its threads would spin for milliseconds, on cores where a node beside us may be computing."""
    prepare = (
        "from p2pmoe.client.replies import is_finite\n"
        "from p2pmoe.protocol.finite import SMALL, all_surely_finite\n"
        "small, half = [torch.ones(SMALL - 1) for _ in range(8)], large.half()"
    )
    look = "assert is_finite([large]) and all_surely_finite(small) and is_finite([half])"
    assert threads_woken_by(prepare, look) == "0 True\n"
