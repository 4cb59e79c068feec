"""The answering side over HTTP: routes, status codes, streaming. Knows a `Service`, nothing of experts.

Routes (see docs/wire.md): the exchange of many calls, the Open Inference Protocol, info, health and metrics.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict

from p2pmoe.config import HttpConfig, LimitsConfig
from p2pmoe.errors import (
    AddressInUseError,
    BadRequestError,
    CallError,
    DecodeError,
    OverloadedError,
    TooLargeError,
    WireVersionError,
)
from p2pmoe.protocol.frames import EncodedFrame, FrameLimits
from p2pmoe.protocol.messages import version_mismatch
from p2pmoe.rpc.base import Doorkeeper, Service
from p2pmoe.rpc.budget import SharedBudget
from p2pmoe.rpc.exchange import ByteBudget, ServerExchange
from p2pmoe.rpc.http.client import write_frames
from p2pmoe.rpc.http.direct import JOIN_BYTES
from p2pmoe.rpc.http.documents import WIRE_VERSION_HEADER
from p2pmoe.rpc.http.infer import infer
from p2pmoe.rpc.http.sessions import SAFE_HEADERS, Door
from p2pmoe.types import WIRE_VERSION, Caller

_READ_BYTES = 1024 * 1024
_GATHER_S = 0.002
_FRAMES_HEADERS: CIMultiDict[str] = CIMultiDict({hdrs.CONTENT_TYPE: "application/octet-stream"})
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def frame_limits(limits: LimitsConfig) -> FrameLimits:
    return FrameLimits(limits.max_header_bytes, limits.max_body_bytes, limits.max_tensors, limits.max_rank)


class HttpServer:
    """A listening HTTP service. `start()` and `close()` belong to one event loop."""

    def __init__(
        self,
        service: Service,
        config: HttpConfig,
        limits: LimitsConfig,
        *,
        server_name: str,
        render_metrics: Callable[[], tuple[bytes, str]],
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self._service = service
        self._config = config
        self._limits = limits
        self._frame_limits = frame_limits(limits)
        self._budget = SharedBudget(limits.max_inflight_bytes)
        self._server_name = server_name
        self._render_metrics = render_metrics
        self._door = Door(doorkeeper, read_timeout_s=limits.idle_read_timeout_s)
        self._runner: web.AppRunner | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self.port = 0

    def __repr__(self) -> str:
        return f"<HttpServer {self._config.host}:{self.port}: {len(self._running)} requests, {self._budget}>"

    async def start(self) -> None:
        """Listen. Raises AddressInUseError when the port is taken or not allowed."""
        app = web.Application(middlewares=[self._answer_errors])
        app.add_routes(self._routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a caller that is gone must not occupy the queue
            keepalive_timeout=self._config.keepalive_timeout_s,
            auto_decompress=False,  # nobody needs compressed tensors, and a bomb would pass the limits
            read_bufsize=_READ_BYTES,
            shutdown_timeout=1.0,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._config.host, self._config.port, reuse_address=True)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise _listen_error(self._config, error) from error
        self.port = self._runner.addresses[0][1]

    async def drain(self, timeout_s: float) -> None:
        """Wait until running requests are answered, at most `timeout_s`."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)

    async def close(self) -> None:
        """Stop listening and close every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

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
            web.post(f"/p2pmoe/v{WIRE_VERSION}/exchange", self._exchange),  # a plain path is found faster
            web.post("/p2pmoe/{version:v[0-9]+}/exchange", self._exchange),
            web.get("/p2pmoe/{version:v[0-9]+}/experts", self._experts),
            web.get("/p2pmoe/{version:v[0-9]+}/experts/{uid}", self._expert),
            web.get("/v2", self._server_metadata),
            web.get("/v2/health/live", self._live),
            web.get("/v2/health/ready", self._ready),
            *models,
            *self._door.routes(),
            web.get("/metrics", self._metrics),
        ]

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            self._check_connections()
            self._check_version(request)
            if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
                raise BadRequestError("compressed bodies are not read; send it without Content-Encoding")
            return await handler(request)
        except (CallError, DecodeError) as error:
            return _error_response(error)
        except web.HTTPException as error:
            return _json({"error": f"{request.method} {request.path}: {error.reason}"}, error.status)
        finally:
            self._running.discard(task)

    def _check_connections(self) -> None:
        server = self._runner.server if self._runner is not None else None
        if server is not None and len(server.connections) > self._limits.max_connections:
            raise OverloadedError(f"more than {self._limits.max_connections} connections are open; try again soon")

    def _check_version(self, request: web.Request) -> None:
        asked = request.match_info.get("version", f"v{WIRE_VERSION}")[1:]
        stated = request.headers.get(WIRE_VERSION_HEADER, asked)
        for version in (asked, stated):
            if version != str(WIRE_VERSION):
                raise WireVersionError(version_mismatch(version[:32]))

    async def _exchange(self, request: web.Request) -> web.StreamResponse:
        caller = self._door.identify(request)
        if (request.content_length or 0) > self._limits.max_exchange_bytes:
            raise TooLargeError(
                f"an exchange of {request.content_length} bytes is over the limit of "
                f"{self._limits.max_exchange_bytes}; split it"
            )
        budget = self._budget.of(caller.key)
        return await _Exchange(request, caller, self._service, self._frame_limits, budget, self._limits).run()

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        caller = self._door.identify(request)
        return await infer(
            request, caller, self._service, self._limits, self._frame_limits, self._budget.of(caller.key)
        )

    async def _experts(self, request: web.Request) -> web.Response:
        return _json({"experts": self._service.experts()})

    async def _expert(self, request: web.Request) -> web.Response:
        return _json(self._service.expert(request.match_info["uid"]))

    async def _server_metadata(self, request: web.Request) -> web.Response:
        return _json({"name": "p2pmoe", "version": self._server_name, "extensions": ["binary_tensor_data"]})

    async def _live(self, request: web.Request) -> web.Response:
        return _json({"live": True})

    async def _ready(self, request: web.Request) -> web.Response:
        ready = not self._service.draining and await self._service.ready()
        return _json({"ready": ready}, 200 if ready else 503)

    async def _model_metadata(self, request: web.Request) -> web.Response:
        return _json(self._service.expert(request.match_info["uid"])["oip"])

    async def _model_ready(self, request: web.Request) -> web.Response:
        uid = request.match_info["uid"]
        self._service.expert(uid)
        ready = not self._service.draining
        return _json({"name": uid, "ready": ready}, 200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        self._door.check_admin(request)
        body, content_type = self._render_metrics()
        return web.Response(body=body, headers={**SAFE_HEADERS, hdrs.CONTENT_TYPE: content_type})


class _Exchange:
    """Drives one ServerExchange over one HTTP request."""

    def __init__(
        self,
        request: web.Request,
        caller: Caller,
        service: Service,
        frame_limits: FrameLimits,
        budget: ByteBudget,
        limits: LimitsConfig,
    ) -> None:
        self._request = request
        self._limits = limits
        self._wakeup = asyncio.Event()
        self._calls = ServerExchange(
            service, frame_limits, budget, max_calls=limits.max_calls_per_exchange, wake=self._wake, caller=caller
        )
        self._response: web.StreamResponse | None = None
        self._all_read = False
        self._gathering = False
        self._writer: asyncio.Task[None] | None = None

    async def run(self) -> web.StreamResponse:
        try:
            await self._read_calls()
            self._all_read = True
            self._wakeup.set()
            # A result that came while the request was still arriving has started a writer task; else write here.
            await (self._writer or self._write_results())
        finally:
            self._calls.close()
            if self._writer is not None and not self._writer.done():
                self._writer.cancel()
                await asyncio.wait([self._writer])
        assert self._response is not None
        return self._response

    def _wake(self) -> None:
        if self._gathering and not self._complete:
            return
        self._wakeup.set()
        if not self._all_read and self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_results())

    async def _read_calls(self) -> None:
        content, limits = self._request.content, self._limits
        received = 0
        while not self._calls.broken:
            try:
                # A body that has arrived whole needs no timer.
                chunk = await (content.readany() if content.is_eof() else self._read_in_time())
            except TimeoutError:
                pause = f"no data for {limits.idle_read_timeout_s} s in the middle of an exchange"
                self._calls.break_off(BadRequestError(pause))
                return
            received += len(chunk)
            if received > limits.max_exchange_bytes:
                too_large = f"the exchange is over the limit of {limits.max_exchange_bytes} bytes; split it"
                self._calls.break_off(TooLargeError(too_large))
                return
            if chunk:
                self._calls.feed(chunk)
            if content.at_eof():
                self._calls.feed_eof()
                return

    async def _read_in_time(self) -> bytes:
        async with asyncio.timeout(self._limits.idle_read_timeout_s):
            return await self._request.content.readany()

    @property
    def _complete(self) -> bool:
        return self._all_read and not self._calls.outstanding

    async def _write_results(self) -> None:
        while True:
            if 0 < self._calls.result_bytes <= JOIN_BYTES and not self._complete:
                await self._gather()
            frames = self._calls.take_results()
            complete = self._complete
            if complete and self._response is None and sum(frame.nbytes for frame in frames) <= JOIN_BYTES:
                self._response = self._small_response(frames)
                return
            if frames or complete:
                response = self._response or await self._start_response(frames, complete)
                await write_frames(frames, response.write)
            if complete:
                break
            if not frames:
                await self._wakeup.wait()
                self._wakeup.clear()
        await response.write_eof()

    async def _gather(self) -> None:
        """Wait a moment for more small results: each write wakes both ends' loops, on cores that could be computing."""
        self._gathering = True
        self._wakeup.clear()
        timer = asyncio.get_running_loop().call_later(_GATHER_S, self._wakeup.set)
        try:
            await self._wakeup.wait()
        finally:
            timer.cancel()
            self._gathering = False

    def _small_response(self, frames: list[EncodedFrame]) -> web.Response:
        """All results at once, as one body: headers and body leave in one write."""
        body = b"".join(buffer for frame in frames for buffer in frame.buffers)
        response = web.Response(body=body, headers=_FRAMES_HEADERS)
        if self._calls.broken:
            response.force_close()
        return response

    async def _start_response(self, frames: list[EncodedFrame], complete: bool) -> web.StreamResponse:
        response = self._response = web.StreamResponse(headers=_FRAMES_HEADERS)
        if self._calls.broken:
            response.force_close()  # the rest of the request is unread
        if complete:
            response.content_length = sum(frame.nbytes for frame in frames)
        else:
            response.enable_chunked_encoding()
        await response.prepare(self._request)
        return response


def _json(document: Any, status: int = 200) -> web.Response:
    body = msgspec.json.encode(document)
    return web.Response(body=body, status=status, content_type="application/json", headers=SAFE_HEADERS)


def _error_response(error: CallError | DecodeError) -> web.Response:
    response = _json({"error": str(error), "code": error.code, "message": str(error)}, error.code)
    if error.code == 426:
        response.headers[hdrs.UPGRADE] = f"p2pmoe/{WIRE_VERSION}"
    if error.code == 401:
        response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="p2pmoe"'
    if error.code in (429, 503):
        response.headers[hdrs.RETRY_AFTER] = str(max(1, round(getattr(error, "retry_after_s", None) or 1)))
    response.force_close()  # the request's body may be unread
    return response


def _listen_error(config: HttpConfig, error: OSError) -> AddressInUseError:
    where = f"{config.host}:{config.port}"
    if error.errno == errno.EADDRINUSE:
        return AddressInUseError(f"HTTP port {where} is in use; choose another with [http] port, or 0 for any free one")
    return AddressInUseError(f"cannot listen on HTTP {where}: {error.strerror or error}; check [http] host and port")
