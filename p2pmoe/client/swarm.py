"""A trainer's end of the swarm: its event loop thread, its DHT node in client mode, its connections.

The composition root of the client side: it alone builds the parts that remote experts and mixtures call through.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar

from p2pmoe import forks
from p2pmoe.client.ages import Ages, OnRebirth
from p2pmoe.client.answers import StrayReplyError
from p2pmoe.client.calls import CallGroup
from p2pmoe.client.directory import Directory, ExpertInfo
from p2pmoe.client.exchange import Dispatcher
from p2pmoe.client.patience import as_timeout
from p2pmoe.client.schema_choice import SchemaChoice
from p2pmoe.client.trust import Trust
from p2pmoe.client.verification import Verifier, VerifyOptions
from p2pmoe.config import DHTConfig, one_or_more
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import (
    ClosedError,
    DeadlineError,
    DecodeError,
    ExpertNotFoundError,
    NotPicklableError,
    P2PMoEError,
)
from p2pmoe.experts.directory import ExpertDirectory, ExpertRecord, Provider
from p2pmoe.experts.offers import Offer
from p2pmoe.experts.uid import parse_uid
from p2pmoe.faults import run_loop, unexpected
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.rpc.base import Transport, proving
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.types import WIRE_VERSION, Endpoint, PeerId

if TYPE_CHECKING:
    from p2pmoe.client.remote_expert import RemoteExpert

T = TypeVar("T")
_LOOP_PATIENCE_S = 5.0
"""How much longer than its time limit a coroutine may take to end."""
MAX_INFOS: Final = 4096
"""Schemas that are remembered; strangers may announce any number."""


class Swarm:
    """Find and call experts. Use as `with Swarm(...) as swarm:`, or `start()` and `close()`.

    Works from plain synchronous code, beside a running event loop (a notebook), and with `async with`.

    Args:
        initial_peers: `HOST:PORT` of a DHT node, or of several, of which any one that answers is enough.
        identity: the key that this client signs with; a fresh one by default.
        swarm_id: which swarm's records to read.
        owner: public key (64 hexadecimal digits) of a closed swarm's owner; only its members' experts are found then.
        swarm_key: the secret of a private swarm.
        dht_config: all settings of the DHT, in the place of `initial_peers`, `swarm_id` and `owner`.
        directory, transport: replace the DHT and HTTP, e.g. by `StaticDirectory` and `MemoryTransport` in tests.
        timeout_s: how long finding experts may take.
        check_finite: refuse replies with NaN or infinite values; turn it off for experts that give such on purpose.
        verify_fraction: the share of forward calls that a second provider of the same expert is asked as well, in the
            background; one whose answers differ loses standing. For providers that hold the same parameters.
        verify_rtol, verify_atol: how far answers may differ: by atol + rtol × the largest magnitude of the row.
        verify_seed: decides which calls; None is unpredictable.
        on_rebirth: what becomes of a call whose reply shows that an expert has lost what it had learnt, or its last
            updates: "log" is a line and a count (`ages`); "raise" ends it with ExpertRebornError, once for each loss.

    Raises:
        ConfigError: a verify option is out of range, or `owner` is no public key.
        BootstrapError: none of the initial peers answered (from `start`).
    """

    def __init__(
        self,
        initial_peers: str | Sequence[str] = (),
        *,
        identity: Identity | None = None,
        swarm_id: str = "p2pmoe",
        owner: str | None = None,
        swarm_key: SwarmKey | None = None,
        dht_config: DHTConfig | None = None,
        directory: Directory | None = None,
        transport: Transport | None = None,
        timeout_s: float = 10.0,
        check_finite: bool = True,
        verify_fraction: float = 0.0,
        verify_rtol: float = 1e-2,
        verify_atol: float = 1e-4,
        verify_seed: int | None = None,
        on_rebirth: OnRebirth = "log",
    ) -> None:
        self._verify_options = VerifyOptions(verify_fraction, verify_rtol, verify_atol, verify_seed)
        self.check_finite = check_finite
        self.ages = Ages(on_rebirth)
        """What experts say of their age, and how often one was suddenly younger."""
        self._dht: DHTNode | None = None
        self.identity = identity or Identity.generate()
        self._swarm_key = swarm_key
        if directory is None:
            config = dht_config or DHTConfig(initial_peers=one_or_more(initial_peers), swarm_id=swarm_id, owner=owner)
            self._dht = DHTNode(self.identity, config, client_mode=True, swarm_key=swarm_key)
            directory = ExpertDirectory(self._dht)
        self.directory: Directory = directory
        self.trust = Trust(directory, proves=self._proves)
        self.verifier: Verifier | None = None
        """Only where `verify_fraction` is above 0, and from `start` on."""
        self.timeout_s = as_timeout("timeout_s", timeout_s)
        self._transport = transport
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._dispatcher: Dispatcher | None = None
        self._infos: dict[str, ExpertInfo] = {}
        self.schemas = SchemaChoice(self._ask_schema, self.trust.acquaintance)
        """Decides between the schemas that are announced."""
        self._starting = threading.Lock()
        self._begun = self._is_parents = False
        forks.tell(self)

    def __repr__(self) -> str:
        return f"<Swarm: {self._dispatcher or 'not started'}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a model calls through the same swarm: there is one set of threads and connections."""
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise NotPicklableError(
            "a Swarm has threads, connections and a key of its own and cannot be pickled, nor can a model with remote "
            "layers: save model.state_dict() in the place of the model; in the other process open a Swarm, make the "
            "layers anew and load_state_dict(). A data loader's dataset must not hold them: call experts in the main "
            "process"
        )

    # -- life

    def start(self) -> None:
        """Start the loop thread and join the DHT; called by `with`. Safe to call twice."""
        if self._is_parents:
            raise self._closed_error()
        self._begun = True
        with self._starting:
            if self._loop is not None:
                return
            if self._dht is not None:
                self._dht.start()
            self._loop = forks.new_loop()
            self._thread = threading.Thread(target=run_loop, args=(self._loop,), name="p2pmoe-swarm", daemon=True)
            self._thread.start()
            self._transport = self._transport or HttpTransport(identity=self.identity, swarm_key=self._swarm_key)
            self._dispatcher = Dispatcher(self._transport, self._loop, self._note_broken_reply, self.ages)
            if self._verify_options.fraction:
                find, ask = self.find_providers, self.call_async
                self.verifier = Verifier(self._verify_options, self.trust, find, ask, self._loop)

    def close(self) -> None:
        """End running calls, leave the DHT, stop the thread. Safe to call twice, and in a forked child."""
        with self._starting:
            loop, self._loop = self._loop, None
            if loop is None or self._thread is None:
                return
            closing = asyncio.run_coroutine_threadsafe(self._close(), loop)
            try:
                closing.result(timeout=5.0)
            finally:
                loop.call_soon_threadsafe(loop.stop)
                self._thread.join(timeout=5.0)
                if not self._thread.is_alive():
                    loop.close()
                if self._dht is not None:
                    self._dht.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().run_in_executor(None, self.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    # -- finding

    def expert(self, uid: str, **options: Any) -> RemoteExpert:
        """A module that calls one expert; options are those of `RemoteExpert`. Raises InvalidUidError."""
        from p2pmoe.client.remote_expert import RemoteExpert

        return RemoteExpert(self, str(parse_uid(uid)), **options)

    def find_experts(self, pattern: str) -> list[ExpertRecord]:
        """Every expert and provider that a uid, prefix or glob matches, e.g. "ffn.*". Raises InvalidUidError."""
        return self.run(self.directory.find_experts(pattern))

    async def find_experts_async(self, pattern: str) -> list[ExpertRecord]:
        """`find_experts` from a coroutine of any loop."""
        return await self.run_async(self.directory.find_experts(pattern))

    async def find_providers(self, uid: str, *, again: bool = False) -> tuple[Provider, ...]:
        """Live providers of a uid, the most trusted first. Raises ExpertNotFoundError. On the swarm's loop.

        `again` reads the records from the network, whatever is cached.
        """
        found = await self.directory.find_providers(uid, again=again)
        # Not the newest first, which changes with every refresh: two trainers would train two twins by turns.
        providers = self.trust.order(tuple(sorted(found, key=lambda each: each.peer_id)), uid)
        if not providers:
            raise self._not_found(uid)
        return providers

    async def expert_info(self, uid: str, providers: Sequence[Provider]) -> ExpertInfo:
        """The schemas of an expert, asked once for each digest. On the swarm's loop."""
        last: P2PMoEError | None = None
        for provider in self.trust.order(tuple(providers), uid):
            known = self._infos.get(provider.schema_digest)
            if known is not None:
                return known
            try:
                return await self._ask_provider(uid, provider)
            except P2PMoEError as error:
                last = error
        raise last or self._not_found(uid)

    def note_failure(self, provider: Provider, error: P2PMoEError, *uids: str) -> None:
        """Calls of these experts failed: see `Trust.note_failure`."""
        self.trust.note_failure(provider, error, *uids)

    # -- calling

    @property
    def dispatcher(self) -> Dispatcher:
        """Raises ClosedError before `start` and after `close`."""
        if self._dispatcher is None or self._loop is None:
            raise self._closed_error()
        return self._dispatcher

    @property
    def transport(self) -> Transport:
        """Raises ClosedError before `start`."""
        if self._transport is None or self._is_parents:
            raise self._closed_error()
        return self._transport

    def call(self, group: CallGroup, timeout_s: float) -> None:
        """Send a group and block until it is done or `timeout_s` has passed."""
        self.dispatcher.call(group, timeout_s)
        self.ages.raise_if_reborn()

    async def call_async(self, group: CallGroup, timeout_s: float) -> None:
        """`call` from a coroutine of any loop."""
        dispatcher = self.dispatcher
        dispatcher.submit(group)
        try:
            await group.wait_async(timeout_s)
        finally:
            dispatcher.abandon(group)
        self.ages.raise_if_reborn()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the swarm's loop and block for its result. Raises DeadlineError."""
        future = self._schedule(coroutine, timeout_s)
        try:
            return future.result((timeout_s or self.timeout_s) + _LOOP_PATIENCE_S)
        except TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise DeadlineError("the swarm's own event loop does not turn: something blocks its thread") from error

    async def run_async(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """`run` from a coroutine of any loop."""
        return await asyncio.wrap_future(self._schedule(coroutine, timeout_s))

    # -- private

    def _schedule(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None) -> Future[T]:
        loop = self._loop
        if loop is None:
            coroutine.close()
            raise self._closed_error()
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise ClosedError("a blocking call from the swarm's own loop would never end; await the async form")
        return asyncio.run_coroutine_threadsafe(_bounded(coroutine, timeout_s or self.timeout_s), loop)

    def _not_found(self, uid: str) -> ExpertNotFoundError:
        parsed = parse_uid(uid)
        announced = self.directory.announced(parsed.prefix).get(parsed.suffix, ())
        standing = self.trust.standing
        shunned = {each.peer_id for each in announced if standing.verdict(each.peer_id, uid) == "shunned"}
        why = f" ({len(shunned)} peers are not asked for a while because their replies were wrong)" if shunned else ""
        error = ExpertNotFoundError(
            f"no live provider of {uid} is known{why}; run `p2pmoe lookup '{parsed.prefix}*'` to see who is there"
        )
        error.may_appear = any(each.peer_id not in shunned for each in announced)
        return error

    def _closed_error(self) -> ClosedError:
        if self._is_parents:
            return forks.forked("opened the swarm", "make a new Swarm in the worker")
        return ClosedError("the swarm is not open; use it as `with p2pmoe.Swarm(...) as swarm:`")

    def became_a_child(self) -> None:
        """See `forks`: the loop's thread and the connections stayed in the parent."""
        self._starting = threading.Lock()
        self._is_parents = self._begun
        if self._is_parents:
            self._loop = self._thread = self._dispatcher = self.verifier = None

    async def _ask_schema(self, offer: Offer) -> ExpertInfo:
        return await self._ask_provider(str(offer.uid), offer.provider)

    async def _ask_provider(self, uid: str, provider: Provider) -> ExpertInfo:
        """One provider's word on an expert, proved by the digest that it announced."""
        path = f"/p2pmoe/v{WIRE_VERSION}/experts/{uid}"
        try:
            document = await self.transport.get_json(provider.endpoint, path)
            info = ExpertInfo.from_json(document, expected_digest=provider.schema_digest)
        except P2PMoEError as error:
            self.note_failure(provider, error, uid)
            raise
        if len(self._infos) >= MAX_INFOS:
            self._infos.clear()
        self._infos[provider.schema_digest] = info
        return info

    def _proves(self, endpoint: Endpoint) -> bool:
        return proving(self._transport)(endpoint)

    def _note_broken_reply(self, peer_id: PeerId, error: DecodeError) -> None:
        if error.is_proof:
            self.trust.note_lie(peer_id, "broken_reply", str(error))
        elif isinstance(error, StrayReplyError):
            self.trust.standing.count(peer_id, "broken_reply")

    async def _close(self) -> None:
        if self.verifier is not None:
            await self.verifier.close()
        if self._dispatcher is not None:
            await self._dispatcher.close()
        if self._transport is not None:
            await self._transport.close()


async def _bounded(coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await coroutine
    except TimeoutError as error:
        if isinstance(error, P2PMoEError):
            raise
        raise DeadlineError(f"no answer from the swarm within {timeout_s:.3g} s") from error
    except (KeyboardInterrupt, SystemExit) as error:  # of code that runs on the loop: it would end the loop's thread
        raise unexpected("a coroutine on the swarm's loop", error) from error
