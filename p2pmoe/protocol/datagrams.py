r"""The DHT's RPCs as datagrams: bytes and values. Knows no socket and no table.

A datagram is `header | msgpack array`, at most 1,200 bytes. The header is one version byte (1) and four bytes
of the swarm (`SHA256("p2pmoe-swarm-1\0" | swarm_id)[:4]`). The array starts with the message's kind:

    0 Ping    [kind, id, sender, padding]                        16 Pong    [kind, id, sender, token, seen, time_ms]
    1 Find    [kind, id, sender, token, key, want, padding]      17 Found   [kind, id, sender, token, v4, v6,
                                                                             digest, pages, records]
    2 Page    [kind, id, sender, token, key, index]              18 Paged   [kind, id, sender, token, digest,
                                                                             pages, records]
    3 Store   [kind, id, sender, token, key, records]            19 Stored  [kind, id, sender, token, statuses]
    4 Prove   [kind, id, sender, padding]                        20 Proof   [kind, id, sender, token, signature]

`id` is 8 random bytes that the reply repeats. `sender` is the sender's node id, or empty from a client, which
nobody enters in a table; in a request two more bytes may follow, the port at which the sender is reached in the place
of the one that the datagram comes from. Contacts are packed as node id 20 | address 4 or 16 | port 2.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import ipaddress
import socket
import struct
from collections.abc import Iterable
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from p2pmoe.errors import DecodeError, EncodeError
from p2pmoe.identity import NODE_ID_BYTES
from p2pmoe.protocol.records import KEY_BYTES, MAX_RECORD_BYTES

DATAGRAM_VERSION: Final = 1
MAX_DATAGRAM_BYTES: Final = 1200
MAX_PAGE_BYTES: Final = 1120
"""Record bytes of one Paged or Store datagram, each record's length prefix of 3 bytes included."""
MAX_FIRST_PAGE_BYTES: Final = 800
"""Record bytes in a Found datagram, which also carries contacts."""
MAX_CONTACTS: Final = 32
TOKEN_BYTES: Final = 8
CALL_ID_BYTES: Final = 8
SENDER_WITH_PORT_BYTES: Final = NODE_ID_BYTES + 2
SIGNATURE_BYTES: Final = 64
DIGEST_BYTES: Final = 8
RECORD_OVERHEAD_BYTES: Final = 3
SEAL_BYTES: Final = 32
"""What every size is smaller by in a private swarm, so that the sealed datagram has at most 1,200 bytes."""

Address = tuple[str, int]
"""An IP literal in its shortest form, and a port. A link-local host has its scope, which is never sent."""

_Id = Annotated[bytes, Meta(min_length=CALL_ID_BYTES, max_length=CALL_ID_BYTES)]
_Sender = Annotated[bytes, Meta(max_length=SENDER_WITH_PORT_BYTES)]
_Token = Annotated[bytes, Meta(max_length=TOKEN_BYTES)]
_Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Digest = Annotated[bytes, Meta(max_length=DIGEST_BYTES)]
_Small = Annotated[int, Meta(ge=0, le=65535)]
_Padding = Annotated[bytes, Meta(max_length=MAX_DATAGRAM_BYTES)]
_Records = Annotated[list[Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]], Meta(max_length=16)]


class Status(enum.IntEnum):
    """What became of one record of a Store."""

    STORED = 0
    MALFORMED = 1
    BAD_TOKEN = 2
    EXPIRED = 3
    STALE = 4
    FULL = 5
    FAR = 6
    BAD_SIGNATURE = 7
    NOT_DELEGATED = 8


class _Message(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    id: _Id
    sender: _Sender


class Ping(_Message, tag=0, array_like=True, frozen=True):
    padding: _Padding = b""


class Find(_Message, tag=1, array_like=True, frozen=True):
    token: _Token
    key: _Key
    want: Annotated[int, Meta(ge=0, le=MAX_CONTACTS)]
    """How many contacts; 0 asks for none."""
    padding: _Padding = b""


class Page(_Message, tag=2, array_like=True, frozen=True):
    token: _Token
    key: _Key
    index: _Small


class Store(_Message, tag=3, array_like=True, frozen=True):
    token: _Token
    key: _Key
    records: _Records


class Prove(_Message, tag=4, array_like=True, frozen=True):
    padding: _Padding = b""


class Pong(_Message, tag=16, array_like=True, frozen=True):
    token: _Token
    seen: Annotated[bytes, Meta(max_length=18)]
    """The address that the ping came from, packed as 4 or 16 bytes and a port."""
    time_ms: Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Found(_Message, tag=17, array_like=True, frozen=True):
    token: _Token
    v4: Annotated[bytes, Meta(max_length=MAX_CONTACTS * 26)]
    v6: Annotated[bytes, Meta(max_length=MAX_CONTACTS * 38)]
    digest: _Digest
    """Of the whole record set of the key; empty when there is none."""
    pages: _Small
    records: _Records
    """Page 0."""


class Paged(_Message, tag=18, array_like=True, frozen=True):
    token: _Token
    digest: _Digest
    pages: _Small
    records: _Records


class Stored(_Message, tag=19, array_like=True, frozen=True):
    token: _Token
    statuses: Annotated[bytes, Meta(max_length=16)]


class Proof(_Message, tag=20, array_like=True, frozen=True):
    token: _Token
    signature: Annotated[bytes, Meta(max_length=SIGNATURE_BYTES)]
    """Of `proof_text`, by the key of the sender; empty from who does not prove it."""


Request = Ping | Find | Page | Store | Prove
Reply = Pong | Found | Paged | Stored | Proof
Message = Request | Reply

REPLY_OF: Final[dict[type, type]] = {Ping: Pong, Find: Found, Page: Paged, Store: Stored, Prove: Proof}

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class Sizes(NamedTuple):
    """How long things may be, in bytes: a whole datagram, a page of records, a page in a Found."""

    datagram: int = MAX_DATAGRAM_BYTES
    page: int = MAX_PAGE_BYTES
    first_page: int = MAX_FIRST_PAGE_BYTES


PLAIN: Final = Sizes()
SEALED: Final = Sizes(*(size - SEAL_BYTES for size in PLAIN))


class Contact(NamedTuple):
    """Where a node says that a node listens."""

    node_id: bytes
    host: str
    port: int

    @property
    def address(self) -> Address:
        return self.host, self.port


def header_of(swarm_id: str) -> bytes:
    """The five bytes that every datagram of a swarm starts with."""
    tag = hashlib.sha256(b"p2pmoe-swarm-1\0" + swarm_id.encode()).digest()[:4]
    return bytes([DATAGRAM_VERSION]) + tag


def encode_datagram(header: bytes, message: Message) -> bytes:
    """Raises EncodeError when the datagram would be over 1,200 bytes: our own bug, never sent."""
    datagram = header + _encoder.encode(message)
    if len(datagram) > MAX_DATAGRAM_BYTES:
        raise EncodeError(f"a {type(message).__name__} of {len(datagram)} bytes is over {MAX_DATAGRAM_BYTES}")
    return datagram


def decode_datagram(header: bytes, datagram: bytes) -> Message:
    """Parse a stranger's bytes. Raises DecodeError, and nothing else, for whatever is no message of this swarm."""
    if len(datagram) > MAX_DATAGRAM_BYTES:
        raise DecodeError(f"a datagram of {len(datagram)} bytes is over {MAX_DATAGRAM_BYTES}", code=413)
    if not datagram.startswith(header):
        raise DecodeError("a datagram of another swarm or version")
    try:
        message: Message = _decoder.decode(memoryview(datagram)[len(header) :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"not a datagram: {error}") from error
    if len(message.sender) not in {0, NODE_ID_BYTES} and not _names_a_port(message):
        raise DecodeError("not a datagram: a sender has 0 or 20 bytes, in a request also 22 with a port")
    return message


def _names_a_port(message: Message) -> bool:
    return (
        len(message.sender) == SENDER_WITH_PORT_BYTES
        and isinstance(message, Request)
        and message.sender[NODE_ID_BYTES:] != b"\0\0"
    )


def sender_at(node_id: bytes, port: int | None) -> bytes:
    """The sender of a request whose replies come from `port`, where that is not the port it is sent from."""
    return node_id if port is None else node_id + port.to_bytes(2, "big")


def contact_of(request: Request, source: Address) -> Contact | None:
    """Where the sender of a request says that it listens: at its own address, whatever the port. None: nowhere."""
    if not request.sender:
        return None
    port = int.from_bytes(request.sender[NODE_ID_BYTES:], "big") or source[1]
    return Contact(request.sender[:NODE_ID_BYTES], source[0], port)


def proof_text(header: bytes, call_id: bytes) -> bytes:
    """What a node signs to show that it holds its key now. Who asks chose the id."""
    return b"p2pmoe-node-proof-1\0" + header + call_id


def pack_address(host: str, port: int) -> bytes:
    """6 or 18 bytes. `host` must be an IP literal, whose scope is left out; raises EncodeError otherwise."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.inet_pton(family, host.partition("%")[0]) + struct.pack(">H", port)
    except (OSError, struct.error, ValueError) as error:
        raise EncodeError(f"{host!r}:{port} is no IP literal with a port") from error


def unpack_address(packed: bytes) -> Address | None:
    """The address of 6 or 18 bytes, or None for anything that no datagram should be sent to."""
    if len(packed) == 6:
        host = socket.inet_ntop(socket.AF_INET, packed[:4])
    elif len(packed) == 18:
        host = socket.inet_ntop(socket.AF_INET6, packed[:16])
    else:
        return None
    port = int.from_bytes(packed[-2:], "big")
    return (host, port) if port and is_sendable(packed[:-2]) else None


def is_sendable(packed_ip: bytes) -> bool:
    """False for the unspecified, multicast, reserved, broadcast and IPv4-mapped addresses."""
    first = packed_ip[0]
    if len(packed_ip) == 4:
        return 0 < first < 224
    return first != 0xFF and packed_ip[:12] != bytes(10) + b"\xff\xff" and packed_ip != bytes(16)


def pack_contacts(contacts: Iterable[Contact]) -> tuple[bytes, bytes]:
    """`(v4, v6)`, each contact 26 or 38 bytes."""
    v4, v6 = bytearray(), bytearray()
    for node_id, host, port in contacts:
        packed = node_id + pack_address(host, port)
        (v6 if ":" in host else v4).extend(packed)
    return bytes(v4), bytes(v6)


def unpack_contacts(v4: bytes, v6: bytes) -> list[Contact]:
    """The contacts that may be sent to; others are left out.

    Raises DecodeError when a length is no multiple of a contact's size or there are more than 32.
    """
    if len(v4) % 26 or len(v6) % 38 or len(v4) // 26 + len(v6) // 38 > MAX_CONTACTS:
        raise DecodeError("contacts of a wrong length")
    contacts = []
    for packed, size in ((v4, 26), (v6, 38)):
        for start in range(0, len(packed), size):
            address = unpack_address(packed[start + NODE_ID_BYTES : start + size])
            if address is not None:
                contacts.append(Contact(packed[start : start + NODE_ID_BYTES], *address))
    return contacts


@functools.lru_cache(maxsize=65_536)
def scope_of(host: str) -> int:
    """How far an address reaches: 0 this machine, 1 the local network, 2 the world."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_loopback:
        return 0
    return 1 if address.is_private or address.is_link_local else 2


@functools.lru_cache(maxsize=4096)
def is_link_local(host: str) -> bool:
    """Whether an address means something on one link only, and needs a scope."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return address.version == 6 and address.is_link_local
