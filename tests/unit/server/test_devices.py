"""Devices: a batch is merged, computed and brought back, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from torch import nn

from p2pmoe.protocol.schema import BatchTensorProto
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.devices import CudaDevice, PlainDevice, merge, open_device
from p2pmoe.server.runtime import Runtime
from p2pmoe.server.task_pool import Batch, Task, TaskPool

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")


def make_batch(tensors: list[torch.Tensor]) -> Batch:
    loop = asyncio.new_event_loop()
    tasks = [Task((each,), len(each), loop.create_future(), 0.0, None) for each in tensors]
    loop.close()
    return Batch(TaskPool(lambda *inputs: inputs), tasks, sum(map(len, tensors)), 0.0)


def make_backend(module: nn.Module, device: str) -> ExpertBackend:
    module = copy.deepcopy(module).to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return ExpertBackend("ffn.0", module, optimizer, args_schema=(BatchTensorProto(8),))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
async def test_merged_calls_give_what_each_alone_gives(device: str) -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    reference, backend = make_backend(module, "cpu"), make_backend(module, device)
    assert isinstance(open_device(device), CudaDevice if device == "cuda" else PlainDevice)
    runtime = Runtime(backend.get_pools(), device=device)
    inputs = [torch.randn(rows, 8) for rows in (1, 5, 3)]
    gradients = [torch.randn_like(x) for x in inputs]
    tasks = [backend.forward_pool.submit((x,)) for x in inputs]
    tasks += [backend.backward_pool.submit(pair) for pair in zip(inputs, gradients, strict=True)]
    runtime.start()
    runtime.wake()
    try:
        async with asyncio.timeout(30):
            results = [(await task.future)[0] for task in tasks]
    finally:
        runtime.close()
    expected = [reference.forward(x)[0] for x in inputs]
    expected += reference.backward(torch.cat(inputs), torch.cat(gradients))[0].split([1, 5, 3])
    for result, wanted in zip(results, expected, strict=True):
        assert result.device.type == "cpu"
        torch.testing.assert_close(result, wanted)
    assert backend.update_count == 1, "one batch is one step"
    for ours, theirs in zip(backend.expert.parameters(), reference.expert.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("columns", [1, 300, 70_000])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 0, 5), (100, 7, 230, 1, 1), (2,) * 300])
def test_calls_are_merged_in_their_order(dtype: torch.dtype, columns: int, rows: tuple[int, ...]) -> None:
    if sum(rows) * columns > 1_000_000:
        columns = 1_000
    torch.manual_seed(4)
    tensors = [torch.randint(0, 99, (each, columns)).to(dtype) for each in rows]
    (merged,) = merge(make_batch(tensors))
    assert merged.dtype is dtype
    assert torch.equal(merged, torch.cat(tensors))
