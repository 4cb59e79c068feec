"""Exchanges over sockets of a thread that blocks. The standard library's HTTP; no event loop.

Rules:
1. Only what nearly every call is: a peer with a numeric address and, where it wants one, a session that is open.
   Everything else is told to go through the event loop, whose connections these ones stand beside.
2. Every operation on a socket ends at the exchange's deadline, however slowly bytes trickle in.
3. A connection that broke before the answer began is replaced once: the peer may have closed it while it was idle.
   The ids are the same, and a server applies a backward id at most once, so asking again is safe.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from http.client import HTTPException
from typing import Final

from aiohttp import hdrs
from yarl import URL

from p2pmoe.errors import PeerUnreachableError
from p2pmoe.forks import shared
from p2pmoe.protocol.frames import EncodedFrame, FrameLimits, FrameReader
from p2pmoe.protocol.messages import MAX_DOCUMENT_BYTES, ResponseHeader, response_decoder
from p2pmoe.rpc.base import Reply
from p2pmoe.rpc.deadline import Deadline
from p2pmoe.rpc.http.client_sessions import ClientSessions
from p2pmoe.rpc.http.documents import refusal_of, unreachable
from p2pmoe.rpc.http.link import BUFFER_BYTES, Answer, Link
from p2pmoe.rpc.http.tls import Pins
from p2pmoe.rpc.http.writing import body_of, joined, post_head, with_length
from p2pmoe.types import Endpoint

IDLE_S: Final = 30.0
"""After which an idle connection is closed."""
_MAX_IDLE: Final = 8  # connections of one peer
_MAX_PEERS: Final = 1024
_BROKEN: Final = (OSError, HTTPException)  # those of TLS are OSErrors too


class _Peer:
    """What is prepared for one endpoint."""

    def __init__(self, url: URL, headers: Sequence[tuple[str, str]], context: ssl.SSLContext | None) -> None:
        self.url = url
        self.head = post_head(url, headers)
        self.context = context
        self.idle: deque[Link] = deque()

    def __repr__(self) -> str:
        return f"<_Peer {self.url}: {len(self.idle)} idle>"


class BlockingPosts:
    """Posts frames to one path of many peers, each in the thread that calls; any thread.

    Args:
        path: where exchanges are.
        headers: of every request, `Host`, `Content-Length` and `Authorization` excepted.
        limits: of the answers' frames.
        pins, sessions: those of the transport that this one stands beside.
    """

    def __init__(
        self,
        path: str,
        headers: Sequence[tuple[str, str]],
        limits: FrameLimits,
        pins: Pins,
        sessions: ClientSessions,
        *,
        connect_timeout_s: float,
    ) -> None:
        self._path, self._headers = path, headers
        self._limits = limits
        self._pins = pins
        self._sessions = sessions
        self._connect_timeout_s = connect_timeout_s
        self._peers: dict[Endpoint, _Peer] = {}
        self._busy: set[Link] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.exchanges = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    def __repr__(self) -> str:
        return f"<BlockingPosts: {self.exchanges} exchanges, {len(self._busy)} running>"

    def try_exchange(
        self,
        endpoint: Endpoint,
        frames: Sequence[EncodedFrame],
        inspect: Callable[[ResponseHeader], bool],
        deadline: Deadline,
    ) -> Generator[Reply, None, None] | None:
        """See `BlockingTransport.try_exchange`."""
        session = self._sessions.known(endpoint)
        if self._closed or (self._sessions.covers(endpoint) and (session is None or session.refusal is not None)):
            return None
        peer = self._peers.get(endpoint) or self._prepare(endpoint)
        if peer is None:
            return None
        authorization = session.authorization if session else None
        nbytes = sum(frame.nbytes for frame in frames)
        link, response = self._post(endpoint, peer, frames, with_length(peer.head, nbytes, authorization), deadline)
        if response.status == 401 and self._sessions.covers(endpoint):  # the loop opens a new session
            self._drop(link)
            return None
        with self._lock:
            self.exchanges += 1
            self.bytes_sent += nbytes
        if response.status != 200:
            raise self._refusal(endpoint, peer, link, response)
        return self._read(endpoint, peer, link, response, inspect)

    def sweep(self) -> int:
        """Close connections that are idle for long; how many idle ones are left."""
        left = 0
        for peer in list(self._peers.values()):
            while (link := _oldest(peer.idle)) is not None:
                if time.monotonic() - link.used_at < IDLE_S and not self._closed:
                    peer.idle.appendleft(link)
                    left += len(peer.idle)
                    break
                link.sock.close()
        return left

    def close(self) -> None:
        """Close every connection; threads that wait for an answer get PeerUnreachableError."""
        with self._lock:
            self._closed = True
        self.sweep()
        for link in list(self._busy):
            link.shut_down()

    # -- private

    def _prepare(self, endpoint: Endpoint) -> _Peer | None:
        try:
            ipaddress.ip_address(endpoint.host)
        except ValueError:  # looking up a name has no deadline
            return None
        context = self._pins.context_for(endpoint)
        peer = _Peer(
            URL(endpoint.url + self._path), self._headers, context if isinstance(context, ssl.SSLContext) else None
        )
        with self._lock:
            if len(self._peers) >= _MAX_PEERS:
                return None
            return self._peers.setdefault(endpoint, peer)

    def _post(
        self, endpoint: Endpoint, peer: _Peer, frames: Sequence[EncodedFrame], head: bytearray, deadline: Deadline
    ) -> tuple[Link, Answer]:
        try:
            link = self._idle_link(peer)
            if link is not None:
                try:
                    return link, self._ask(link, frames, head, deadline)
                except TimeoutError:
                    raise
                except _BROKEN:  # see rule 3
                    pass
            link = self._connect(endpoint, peer, deadline)
            return link, self._ask(link, frames, head, deadline)
        except _BROKEN as error:
            raise _reason(endpoint, error, deadline) from error

    def _idle_link(self, peer: _Peer) -> Link | None:
        while True:
            try:
                link = peer.idle.pop()
            except IndexError:
                return None
            if link.is_usable():
                self._busy.add(link)
                return link
            link.sock.close()

    def _connect(self, endpoint: Endpoint, peer: _Peer, deadline: Deadline) -> Link:
        timeout_s = min(self._connect_timeout_s, deadline.left_s())
        sock = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if peer.context is not None:
                sock = peer.context.wrap_socket(sock)
        except BaseException:
            sock.close()
            raise
        link = Link(shared(sock))
        self._busy.add(link)
        if self._closed:
            self._drop(link)
            raise PeerUnreachableError(f"{endpoint} is not called: the swarm was closed meanwhile")
        return link

    def _ask(self, link: Link, frames: Sequence[EncodedFrame], head: bytearray, deadline: Deadline) -> Answer:
        """Send a request; the answer, its head read."""
        try:
            return link.ask(joined(body_of(frames), bytearray(head), slice_bytes=None), deadline)
        except BaseException:
            self._drop(link)
            raise

    def _read(
        self,
        endpoint: Endpoint,
        peer: _Peer,
        link: Link,
        response: Answer,
        inspect: Callable[[ResponseHeader], bool],
    ) -> Generator[Reply, None, None]:
        reader: FrameReader[ResponseHeader] = FrameReader(response_decoder, self._limits)
        received, whole = 0, False
        try:
            while response.length != 0:
                room = reader.room()
                if len(room) >= BUFFER_BYTES:
                    count = response.readinto(room)
                    if count:
                        reader.filled(count)
                else:
                    chunk = response.read1(BUFFER_BYTES)
                    count = len(chunk)
                    reader.feed(chunk)
                if not count:
                    break
                received += count
                yield from reader.accepted_frames(inspect)
            if response.length:
                raise ConnectionError(f"the connection was closed {response.length} bytes before the answer's end")
            reader.feed_eof()
            whole = not response.will_close
        except _BROKEN as error:
            raise _reason(endpoint, error, link.deadline) from error
        finally:
            with self._lock:
                self.bytes_received += received
            self._give_back(peer, link) if whole else self._drop(link)

    def _refusal(self, endpoint: Endpoint, peer: _Peer, link: Link, response: Answer) -> Exception:
        body = bytearray()
        try:
            while len(body) <= MAX_DOCUMENT_BYTES and (chunk := response.read1(BUFFER_BYTES)):
                body += chunk
        except _BROKEN as error:
            return _reason(endpoint, error, link.deadline)
        finally:
            self._drop(link)
        retry_after = response.headers.get(hdrs.RETRY_AFTER, "")
        return refusal_of(str(peer.url), response.status, response.reason, retry_after, bytes(body))

    def _give_back(self, peer: _Peer, link: Link) -> None:
        link.used_at = time.monotonic()
        with self._lock:
            keep = not self._closed and len(peer.idle) < _MAX_IDLE
            if keep:
                self._busy.discard(link)
                peer.idle.append(link)
        if not keep:
            self._drop(link)

    def _drop(self, link: Link) -> None:
        self._busy.discard(link)
        link.sock.close()


def _oldest(idle: deque[Link]) -> Link | None:
    try:
        return idle.popleft()
    except IndexError:  # another thread may have taken it since somebody looked
        return None


def _reason(endpoint: Endpoint, error: Exception, deadline: Deadline) -> Exception:
    """What to raise for a broken exchange: the system has time limits of its own, which are not the deadline."""
    if isinstance(error, TimeoutError) and time.monotonic() >= deadline.at:
        return TimeoutError("the deadline has passed")
    return error if isinstance(error, PeerUnreachableError) else unreachable(endpoint, error)
