"""The answering side over HTTP: routes, status codes, streaming. Knows a `Service`, nothing of experts.

Routes (see docs/wire.md): the exchange of many calls, the Open Inference Protocol, info, health and metrics.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import hdrs, web

from p2pmoe.config import HttpConfig, LimitsConfig
from p2pmoe.errors import (
    AddressInUseError,
    BadRequestError,
    CallError,
    ConfigError,
    DecodeError,
    ExpertFailedError,
    NameLookupError,
    OverloadedError,
    TooLargeError,
    WireVersionError,
    is_out_of_memory,
    out_of_memory,
    shown,
)
from p2pmoe.faults import attempt, unexpected
from p2pmoe.identity import Identity
from p2pmoe.identity.certificate import CertificateSource
from p2pmoe.protocol.frames import FrameLimits
from p2pmoe.protocol.messages import version_mismatch
from p2pmoe.rpc.base import Doorkeeper, Service
from p2pmoe.rpc.budget import SharedBudget
from p2pmoe.rpc.expert_pages import page_of_query
from p2pmoe.rpc.http.admission import Admission, Ticket
from p2pmoe.rpc.http.answering import ANSWER_BEGUN, AnsweredExchange
from p2pmoe.rpc.http.connection import Connection, ConnectionWatch
from p2pmoe.rpc.http.documents import EXCHANGE_PATH, WIRE_VERSION_HEADER
from p2pmoe.rpc.http.infer import infer
from p2pmoe.rpc.http.listener import Listener
from p2pmoe.rpc.http.metrics_pages import Exposition, MetricsPages
from p2pmoe.rpc.http.prompt_answer import PromptAnswers
from p2pmoe.rpc.http.responses import SAFE_HEADERS, error_response, json_response
from p2pmoe.rpc.http.sessions import Door
from p2pmoe.rpc.http.shared import Shared
from p2pmoe.rpc.http.tls import server_context
from p2pmoe.rpc.token_bucket import TokenBuckets
from p2pmoe.types import WIRE_VERSION, format_host_port, source_of

_READ_BYTES = 1024 * 1024
_RENEWAL_CHECK_S = 60.0
_MAX_FIELD_BYTES = 8190  # of the request line and of each header field
_MAX_FIELDS = 64
_READY_S = 1.0
_BURST_S = 10.0
_UNCOUNTED = frozenset({EXCHANGE_PATH, "/v2/health/live", "/v2/health/ready"})  # calls have limits of their own
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def frame_limits(limits: LimitsConfig) -> FrameLimits:
    return FrameLimits(
        header_bytes=limits.max_header_bytes,
        body_bytes=limits.max_body_bytes,
        tensors=limits.max_tensors,
        rank=limits.max_rank,
        json_depth=limits.max_json_depth,
        elements=limits.max_elements,
    )


class HttpServer:
    """A listening HTTP service. `start()` and `close()` belong to one event loop.

    `identity` is the key that it proves to callers over TLS; without one it speaks plain HTTP.
    """

    def __init__(
        self,
        service: Service,
        config: HttpConfig,
        limits: LimitsConfig,
        *,
        identity: Identity | None = None,
        server_name: str,
        render_metrics: Callable[[], Exposition],
        render_experts: Callable[[str, str], Exposition] | None = None,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self._service = service
        self._config = config
        self._limits = limits
        self._frame_limits = frame_limits(limits)
        self._budget = SharedBudget(limits.max_inflight_bytes)
        self._certificate = CertificateSource(identity, server_context()) if identity else None
        self._server_name = server_name
        self._metrics = MetricsPages(render_metrics, render_experts)
        self._is_ready = Shared(self._ask_ready, _READY_S)
        self._documents = TokenBuckets(limits.source_documents_per_s, _BURST_S * limits.source_documents_per_s)
        self._door = Door(doorkeeper, read_timeout_s=limits.idle_read_timeout_s)
        self._runner: web.AppRunner | None = None
        self._watch = ConnectionWatch(limits)
        self.admission = Admission(limits)
        self._listener = Listener(
            self._make_connection,
            self.admission,
            context=self._certificate.context if self._certificate else None,
            handshake_timeout_s=limits.handshake_timeout_s,
            shutdown_timeout_s=limits.handshake_timeout_s,
        )
        self._renewal: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._answers = PromptAnswers(service, self._door, self._budget, self._frame_limits, limits)
        self.port = 0

    def __repr__(self) -> str:
        requests = len(self._running) + len(self._answers.running)
        return f"<HttpServer {self._config.host}:{self.port}: {requests} requests, {self._budget}>"

    async def start(self) -> None:
        """Listen. Raises AddressInUseError: the port is taken or not allowed; ConfigError: the host's name is none."""
        app = web.Application(middlewares=[self._answer_errors])
        app.add_routes(self._routes())
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,  # a caller that is gone must not occupy the queue
            shutdown_timeout=1.0,
        )
        await self._runner.setup()
        try:
            self.port = await self._listener.start(self._config.host, self._config.port)
        except OSError as error:
            await self._runner.cleanup()
            raise _listen_error(self._config, error) from error
        self._watch.start()
        if self._certificate is not None:
            self._certificate.renew_if_due()  # here what it raises is the start's failure
        self._renew_certificate()

    @property
    def refusals(self) -> dict[str, int]:
        """Connections that were turned away, by reason: a limit, a handshake that failed, a deadline that passed."""
        return {
            "limit": self.admission.refused,
            "handshake": self._listener.failed_handshakes,
            "deadline": self._watch.dropped,
        }

    async def drain(self, timeout_s: float) -> None:
        """Wait until running requests are answered, at most `timeout_s`."""
        running = [*self._running, *(answer.ended() for answer in self._answers.running)]
        if running:
            await asyncio.wait(running, timeout=timeout_s)

    async def close(self) -> None:
        """Stop listening and close every connection."""
        await self._listener.close()
        if self._renewal is not None:
            self._renewal.cancel()
        self._watch.stop()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        await self._metrics.close()
        await self._is_ready.close()

    # -- connections

    def _make_connection(self, ticket: Ticket) -> Connection:
        assert self._runner is not None and self._runner.server is not None
        limits = self._limits
        field_bytes = min(_MAX_FIELD_BYTES, limits.max_http_head_bytes)
        return Connection(
            self._runner.server,
            self._watch,
            ticket,
            self._answers,
            access_log=None,
            keepalive_timeout=self._config.keepalive_timeout_s,
            max_line_size=field_bytes,
            max_field_size=field_bytes,
            max_headers=_MAX_FIELDS,
            lingering_time=limits.linger_s,
            auto_decompress=False,  # nobody needs compressed tensors, and a bomb would pass the limits
            read_bufsize=_READ_BYTES,
        )

    def _renew_certificate(self) -> None:
        # By the wall clock and often: a laptop sleeps, and a clock may be set right long after the start.
        if self._certificate is not None:
            attempt("renewing the certificate", self._certificate.renew_if_due)
            self._renewal = asyncio.get_running_loop().call_later(_RENEWAL_CHECK_S, self._renew_certificate)

    # -- routes

    def _routes(self) -> list[web.RouteDef]:
        models = [
            route
            for model in ("/v2/models/{uid}", "/v2/models/{uid}/versions/1")  # the only version in the metadata
            for route in (
                web.get(model, self._model_metadata),
                web.get(f"{model}/ready", self._model_ready),
                web.post(f"{model}/infer", self._infer),
            )
        ]
        return [
            web.post(EXCHANGE_PATH, self._exchange),  # a plain path is found faster
            web.post("/p2pmoe/{version:v[0-9]+}/exchange", self._exchange),
            web.get("/p2pmoe/{version:v[0-9]+}/experts", self._experts),
            web.get("/p2pmoe/{version:v[0-9]+}/experts/{uid}", self._expert),
            web.get("/v2", self._server_metadata),
            web.get("/v2/health/live", self._live),
            web.get("/v2/health/ready", self._ready),
            *models,
            *self._door.routes(),
            web.get("/metrics", self._metrics_page),
        ]

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            if request.path not in _UNCOUNTED and not request.path.endswith("/infer"):
                self._count_document(request)
            self._check_request(request)
            return await handler(request)
        except (CallError, DecodeError) as error:
            return error_response(error)
        except web.HTTPException as error:
            # The path may be no UTF-8, which would not go into JSON.
            text = shown(f"{request.method} {request.path}: {error.reason}")
            return json_response({"error": text}, error.status)
        except Exception as error:
            if ANSWER_BEGUN in request:
                raise  # half of an answer has left: only the end of the connection remains
            if is_out_of_memory(error):
                return error_response(out_of_memory(error))
            if isinstance(error, OSError):
                raise  # the caller has gone
            told = unexpected("answering a request", error, by_a_stranger=True)
            return error_response(ExpertFailedError(f"the node failed: {told}"))
        finally:
            self._running.discard(task)

    def _check_request(self, request: web.Request) -> None:
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
            raise BadRequestError("compressed bodies are not read; send it without Content-Encoding")
        asked = request.match_info.get("version", f"v{WIRE_VERSION}")[1:]
        stated = request.headers.get(WIRE_VERSION_HEADER, asked)
        for version in (asked, stated):
            if version != str(WIRE_VERSION):
                raise WireVersionError(version_mismatch(version[:32]))

    def _count_document(self, request: web.Request) -> None:
        """Raises OverloadedError: also for what is refused or not there, which costs as much."""
        rate = self._limits.source_documents_per_s
        wait_s = self._documents.take(source_of(request.remote or ""), 1.0, asyncio.get_running_loop().time())
        if wait_s:
            error = OverloadedError(f"over {rate:g} documents a second of one address; try again after {wait_s:.3g} s")
            error.retry_after_s = wait_s
            raise error

    async def _exchange(self, request: web.Request) -> web.StreamResponse:
        caller = self._door.identify(request.headers.get(hdrs.AUTHORIZATION), request.remote or "")
        if (request.content_length or 0) > self._limits.max_exchange_bytes:
            raise TooLargeError(
                f"an exchange of {request.content_length} bytes is over the limit of "
                f"{self._limits.max_exchange_bytes}; split it"
            )
        budget = self._budget.of(caller.key)
        exchange = AnsweredExchange(request, caller, self._service, self._frame_limits, budget, self._limits)
        response = await exchange.run()
        if not exchange.calls:  # none that the service has counted
            self._count_document(request)
        return response

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        caller = self._door.identify(request.headers.get(hdrs.AUTHORIZATION), request.remote or "")
        return await infer(
            request, caller, self._service, self._limits, self._frame_limits, self._budget.of(caller.key)
        )

    async def _experts(self, request: web.Request) -> web.Response:
        return json_response(self._service.experts(*page_of_query(request.query)))

    async def _expert(self, request: web.Request) -> web.Response:
        return json_response(self._service.expert(request.match_info["uid"]))

    async def _server_metadata(self, request: web.Request) -> web.Response:
        return json_response({"name": "p2pmoe", "version": self._server_name, "extensions": ["binary_tensor_data"]})

    async def _live(self, request: web.Request) -> web.Response:
        return json_response({"live": True})

    async def _ready(self, request: web.Request) -> web.Response:
        ready = not self._service.draining and await self._is_ready.get()
        return json_response({"ready": ready}, 200 if ready else 503)

    async def _ask_ready(self) -> bool:
        return await self._service.ready()

    async def _model_metadata(self, request: web.Request) -> web.Response:
        return json_response(self._service.expert(request.match_info["uid"])["oip"])

    async def _model_ready(self, request: web.Request) -> web.Response:
        uid = request.match_info["uid"]
        ready = self._service.serves(uid)
        return json_response({"name": uid, "ready": ready}, 200 if ready else 503)

    async def _metrics_page(self, request: web.Request) -> web.Response:
        self._door.check_admin(request)
        body, content_type = await self._metrics.get(request.query)
        return web.Response(body=body, headers={**SAFE_HEADERS, hdrs.CONTENT_TYPE: content_type})


def _listen_error(config: HttpConfig, error: OSError) -> AddressInUseError | ConfigError:
    where = format_host_port(config.host, config.port)
    if isinstance(error, NameLookupError):
        return ConfigError(f"http.host {config.host!r}: {error}; give an IP address of this machine")
    if error.errno == errno.EADDRINUSE:
        return AddressInUseError(f"HTTP port {where} is in use; choose another with [http] port, or 0 for any free one")
    return AddressInUseError(f"cannot listen on HTTP {where}: {error.strerror or error}; check [http] host and port")
