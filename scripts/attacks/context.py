"""What an attack holds: the node's address, a random source, raw connections and sockets, calls that fit or do not."""

from __future__ import annotations

import asyncio
import json
import math
import random
import secrets
import ssl
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from attacks.dht_wire import Udp
from attacks.http_wire import Line, Reply, attacker_tls, frame, request
from attacks.target import Target
from p2pmoe.identity import Identity, node_id_of
from p2pmoe.protocol.datagrams import header_of
from p2pmoe.protocol.records import key_of
from p2pmoe.types import WIRE_VERSION

EXCHANGE = f"/p2pmoe/v{WIRE_VERSION}/exchange"
ITEM_BYTES = {"BOOL": 1, "INT64": 8, "INT32": 4, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}


class Context:
    """Made anew for every attack.

    Args:
        uids: the experts: `honest` is trained by the honest client, `victim` is attacked, `untouched` is nobody's.
        infos: their info documents.
        public_key: the node's, as its records say.
        ends_at: when the window of time is over, on the clock of `time.monotonic`.
        source: the address that TCP connections come from; None leaves it to the system.
        authorization: what exchanges carry; of the runner's own questions to a private node.
    """

    def __init__(
        self,
        target: Target,
        uids: dict[str, str],
        infos: dict[str, Any],
        public_key: bytes,
        dice: random.Random,
        ends_at: float,
        source: str | None = None,
        authorization: str | None = None,
    ) -> None:
        self.source = source
        self._headers = {"Authorization": authorization} if authorization else {}
        self.target, self.uids, self.public_key, self.dice, self.ends_at = target, uids, public_key, dice, ends_at
        self.sent: Counter[str] = Counter()
        self.updates: Counter[str] = Counter()
        """Optimizer steps that this attack may rightly have caused, by uid."""
        self._infos = infos
        self.header = header_of(target.swarm_id)
        self.node_id = node_id_of(public_key)
        self.notes: dict[str, Any] = {}
        """Figures for the report."""

    # -- HTTP

    def tls(self) -> ssl.SSLContext | None:
        return attacker_tls() if self.target.scheme == "https" else None

    async def connect(self) -> Line:
        return await Line.open(self.target.host, self.target.port, self.tls(), self.sent, source=self.source)

    async def raw(self, data: bytes, *, eof: bool = False, within_s: float = 4.0) -> Reply:
        """Bytes on a connection of their own, and the first reply to them."""
        async with await self.connect() as line:
            await line.send(data)
            if eof and line.writer.can_write_eof():
                line.writer.write_eof()
            return await line.reply(within_s)

    async def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
        self.sent["requests"] += 1
        return await self.raw(request(method, path, body, headers))

    async def exchange(self, *frames: bytes, headers: dict[str, str] | None = None) -> Reply:
        """Frames in an exchange of their own."""
        return await self.request("POST", EXCHANGE, b"".join(frames), self._headers | (headers or {}))

    async def infer(
        self, header: Any, tail: bytes = b"", *, uid: str = "", headers: dict[str, str] | None = None
    ) -> Reply:
        """A request of the Open Inference Protocol; `header` is JSON text as bytes, or a value."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        lengths = {"Inference-Header-Content-Length": str(len(text))} if tail else {}
        path = f"/v2/models/{uid or self.uids['victim']}/infer"
        return await self.request("POST", path, text + tail, lengths | (headers or {}))

    # -- calls

    def tensors(self, uid: str, direction: str, rows: int = 1) -> list[dict[str, Any]]:
        """Tensor headers that fit the expert."""
        oip = self._infos[uid]["oip"]
        wanted = oip["inputs"] + (oip["outputs"] if direction == "backward" else [])
        return [
            {
                "name": str(index),
                "datatype": each["datatype"],
                "shape": [rows, *each["shape"][1:]],
                "parameters": {"binary_data_size": rows * math.prod(each["shape"][1:]) * ITEM_BYTES[each["datatype"]]},
            }
            for index, each in enumerate(wanted)
        ]

    def body(self, tensors: list[dict[str, Any]], value: float | None = None) -> bytes:
        """Their bytes: small random numbers, or `value` throughout, for FP32; zeros otherwise."""
        parts = []
        for each in tensors:
            size = each["parameters"]["binary_data_size"]
            if each["datatype"] != "FP32":
                parts.append(bytes(size))
            elif value is None:
                parts.append(struct.pack(f"<{size // 4}f", *(self.dice.gauss(0, 0.1) for _ in range(size // 4))))
            else:
                parts.append(struct.pack("<f", value) * (size // 4))
        return b"".join(parts)

    def call(
        self,
        uid: str = "",
        direction: str = "forward",
        *,
        rows: int = 1,
        call_id: str | None = None,
        value: float | None = None,
        values: list[float | None] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> bytes:
        """A frame that fits the schema. `values` fill the tensors one by one."""
        uid = uid or self.uids["victim"]
        tensors = self.tensors(uid, direction, rows)
        filled = values or [value] * len(tensors)
        body = b"".join(self.body([each], fill) for each, fill in zip(tensors, filled, strict=True))
        header = {
            "id": secrets.token_hex(16) if call_id is None else call_id,
            "model_name": uid,
            "inputs": tensors,
            "parameters": {"pass": direction, **(parameters or {})},
        }
        return frame(header, body)

    def bad_call(self, body: bytes | None = None, **changes: Any) -> bytes:
        """A forward call whose first tensor is changed; its body stays the honest one unless given."""
        tensors = self.tensors(self.uids["victim"], "forward")
        body = self.body(tensors) if body is None else body
        first = {**tensors[0], **changes}
        return frame({"id": "bad", "model_name": self.uids["victim"], "inputs": [first, *tensors[1:]]}, body)

    async def update_count(self, uid: str) -> int:
        """How often the expert has been trained, as the node says."""
        return int((await self.target.get_json(f"/p2pmoe/v{WIRE_VERSION}/experts/{uid}"))["updates"])

    # -- DHT

    def udp(self) -> Udp:
        return Udp(self.target.dht_host_port, self.header, self.sent, self.dice)

    def identity(self) -> Identity:
        return Identity.from_seed(self.dice.randbytes(32))

    def key(self, prefix: str) -> bytes:
        return key_of(self.target.swarm_id, prefix)

    def near_key(self) -> bytes:
        """A key that the node is surely among the nearest to."""
        return self.node_id[:16] + self.dice.randbytes(4)

    # -- time

    async def paced(self, per_s: float, burst: int = 1) -> AsyncIterator[int]:
        """Turns until the window is over, at most `per_s` a second, `burst` at once."""
        began, turn = time.monotonic(), 0
        while time.monotonic() < self.ends_at:
            for _ in range(burst):
                yield turn
                turn += 1
            await asyncio.sleep(max(0.0, began + turn / per_s - time.monotonic()))
