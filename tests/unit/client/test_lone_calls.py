"""Exchanges of the calling thread: which groups they take, and what a caller is left with however they end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest
import torch

from p2pmoe import BatchTensorProto
from p2pmoe.client.calls import Call, CallGroup, make_call
from p2pmoe.client.lone_calls import FEW, LoneCalls
from p2pmoe.errors import DeadlineError, DecodeError, OverloadedError, P2PMoEError, PeerUnreachableError
from p2pmoe.protocol.frames import EncodedFrame, Frame
from p2pmoe.protocol.messages import ResponseHeader, TensorHeader
from p2pmoe.rpc.deadline import Deadline
from p2pmoe.types import Endpoint, PeerId

HERE, THERE = Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 2)
X = torch.ones(1, 4)
Script = Callable[[Callable[[ResponseHeader], bool], Deadline], Generator[Frame[ResponseHeader], None, None]]


def make(call_id: str, endpoint: Endpoint = HERE) -> Call:
    protos = (BatchTensorProto(4),)
    return make_call(
        endpoint, "ffn.0", "forward", [X], protos, protos, timeout_s=5.0, call_id=call_id, peer_id=PeerId("alice")
    )


def reply(call_id: str, y: torch.Tensor = X, **header: Any) -> Frame[ResponseHeader]:
    outputs = () if header else (TensorHeader("0", "FP32", tuple(y.shape)),)
    return Frame(ResponseHeader(id=call_id, outputs=outputs, **header), () if header else (y,))


class Scripted:
    """A blocking transport that answers by a script."""

    def __init__(self, script: Script | None) -> None:
        self.script = script
        self.ends: list[str] = []

    def try_exchange(
        self,
        endpoint: Endpoint,
        frames: Sequence[EncodedFrame],
        inspect: Callable[[ResponseHeader], bool],
        deadline: Deadline,
    ) -> Generator[Frame[ResponseHeader], None, None] | None:
        return None if self.script is None else self._run(self.script(inspect, deadline))

    def _run(self, replies: Any) -> Generator[Frame[ResponseHeader], None, None]:
        try:
            yield from replies
            self.ends.append("read to the end")
        except GeneratorExit:
            self.ends.append("given up")
            raise
        except BaseException as error:
            self.ends.append(type(error).__name__)
            raise


class Play:
    """Lone calls over a script, and the lies they told of."""

    def __init__(self, script: Script | None) -> None:
        self.lies: list[DecodeError] = []
        self.transport = Scripted(script)
        self.lone = LoneCalls(self.transport, lambda peer, error: self.lies.append(error))

    def call(self, *calls: Call, others: int = 0, timeout_s: float = 5.0, **options: Any) -> list[Any] | None:
        group = CallGroup(calls, **options)
        taken = self.lone.try_call(group, timeout_s, others)
        assert not self.lone.running
        return group.results(timeout_s) if taken else None


def answers(*frames: Frame[ResponseHeader], then: P2PMoEError | None = None) -> Script:
    def script(
        inspect: Callable[[ResponseHeader], bool], deadline: Deadline
    ) -> Generator[Frame[ResponseHeader], None, None]:
        for frame in frames:
            if inspect(frame.header):
                yield frame
        if then is not None:
            raise then

    return script


def test_results_come_to_their_calls_and_the_answer_is_read_to_its_end() -> None:
    play = Play(answers(reply("b", X * 2), reply("a")))
    results = play.call(make("a"), make("b"))
    assert results is not None
    assert [float(each[0].sum()) for each in results] == [4.0, 8.0]
    assert play.transport.ends == ["read to the end"]
    assert (play.lone.exchanges, play.lone.calls) == (1, 2)


def test_what_the_transport_does_not_take_is_left() -> None:
    play = Play(None)
    assert play.call(make("a")) is None
    assert play.lone.exchanges == 0


def test_a_group_for_several_nodes_is_left() -> None:
    assert Play(answers()).call(make("a"), make("b", THERE)) is None


@pytest.mark.parametrize(("others", "taken"), [(0, True), (FEW - 1, True), (FEW, False), (64, False)])
def test_a_crowd_is_left(others: int, taken: bool) -> None:
    assert (Play(answers(reply("a"))).call(make("a"), others=others) is not None) == taken


def test_one_call_may_fail_and_the_other_not() -> None:
    results = Play(answers(reply("a", code=429, message="full"), reply("b"))).call(make("a"), make("b"))
    assert results is not None
    assert isinstance(results[0], OverloadedError)
    assert torch.equal(results[1][0], X)


@pytest.mark.parametrize("error", [PeerUnreachableError("gone"), OverloadedError("full"), DeadlineError("504")])
def test_how_the_exchange_ends_is_the_reason_of_the_rest(error: P2PMoEError) -> None:
    play = Play(answers(reply("a"), then=error))
    results = play.call(make("a"), make("b"))
    assert results is not None
    assert torch.equal(results[0][0], X)
    assert results[1] is error
    assert not play.lies


def test_an_exchange_that_ends_early_is_an_unreachable_peer() -> None:
    results = Play(answers()).call(make("a"))
    assert results is not None
    assert isinstance(results[0], PeerUnreachableError)


def test_a_lie_is_told_once() -> None:
    wrong = reply("a", torch.ones(1, 5))
    play = Play(answers(wrong, reply("b", torch.ones(2, 4)), then=DecodeError("no frame")))
    results = play.call(make("a"), make("b"))
    assert results is not None
    assert all(isinstance(each, DecodeError) for each in results)
    assert len(play.lies) == 1


def test_a_deadline_leaves_what_is_missing_without_a_result() -> None:
    def script(inspect: Any, deadline: Deadline) -> Any:
        yield reply("a")
        while True:
            deadline.left_s()

    results = Play(script).call(make("a"), make("b"), timeout_s=0.05)
    assert results is not None
    assert torch.equal(results[0][0], X)
    assert isinstance(results[1], DeadlineError)


def test_once_enough_answers_are_there_the_rest_has_its_grace_only() -> None:
    def script(inspect: Any, deadline: Deadline) -> Any:
        assert deadline.left_s() > 4.0
        yield reply("a")
        assert deadline.left_s() <= 0.05
        while True:
            deadline.left_s()

    results = Play(script).call(make("a"), make("b"), enough=lambda position: True, grace_s=0.05)
    assert results is not None
    assert isinstance(results[1], DeadlineError)


def test_an_answer_without_an_end_keeps_nobody_waiting() -> None:
    def script(inspect: Any, deadline: Deadline) -> Any:
        yield reply("a")
        assert deadline.left_s() < 1.0
        while True:
            deadline.left_s()

    play = Play(script)
    results = play.call(make("a"))
    assert results is not None
    assert torch.equal(results[0][0], X)
    assert play.transport.ends == ["TimeoutError"]


def test_an_interrupted_caller_leaves_nothing_behind() -> None:
    def script(inspect: Any, deadline: Deadline) -> Any:
        yield reply("a")
        raise KeyboardInterrupt

    play = Play(script)
    with pytest.raises(KeyboardInterrupt):
        play.call(make("a"), make("b"))
    assert play.lone.running == 0
