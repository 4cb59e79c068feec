"""Hypothesis over what decodes foreign bytes: a value or the reader's typed error, whatever the bytes are.

The judge and the readers are the fuzzer's (`scripts/fuzzing`); here their inputs are built by shape.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fuzzing.guard import Guard
from fuzzing.mutate import join_datagrams
from fuzzing.targets import NAMES, doors, load, swarms
from fuzzing.targets.infer import LIMITS
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.config import MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH, NodeConfig
from p2pmoe.dht.state_file import SavedState, load_state
from p2pmoe.errors import (
    MAX_MESSAGE_CHARS,
    CallError,
    ConfigError,
    DecodeError,
    IdentityError,
    call_error,
    shown,
)
from p2pmoe.experts.bundles import Bundle, decode_bundle, encode_bundle
from p2pmoe.identity import Identity
from p2pmoe.protocol.messages import MAX_DOCUMENT_BYTES, MAX_DOCUMENT_VALUES, TensorHeader, decode_document
from p2pmoe.protocol.schema import DATATYPE_TO_DTYPE
from p2pmoe.rpc.http.infer import tensor_from_json
from p2pmoe.rpc.http.server import frame_limits
from p2pmoe.types import Endpoint

FEW = settings(max_examples=50)
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
_guards: dict[str, Guard] = {}


def check(name: str, data: bytes) -> None:
    if name not in _guards:
        _guards[name] = Guard(load(name))
        _guards[name].warm_up(iter([*load(name).seeds().values(), b""]))
    finding = _guards[name].run(data).finding
    assert finding is None, f"{finding.kind} in {finding.where}: {finding.detail}"


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes(name: str) -> None:
    @FEW
    @given(st.binary(max_size=200))
    def run(data: bytes) -> None:
        check(name, data)

    run()


@pytest.mark.parametrize("name", ["documents", "schemas", "nested", "dht_state", "handshake"])
def test_any_json(name: str) -> None:
    @FEW
    @given(values)
    def run(value: Any) -> None:
        check(name, json.dumps(value).encode())

    run()


@FEW
@given(st.lists(st.sampled_from(sorted(NodeConfig.__struct_fields__)) | st.text(max_size=3), max_size=3), values)
def test_any_toml(path: list[str], value: Any) -> None:
    key = ".".join(json.dumps(part) for part in path) or "x"
    check("node_toml", f"{key} = {json.dumps(value)}".encode())


@FEW
@given(st.binary(max_size=120), st.sampled_from(["PRIVATE KEY", "EC PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "x"]))
def test_any_pem(content: bytes, kind: str) -> None:
    import base64

    check("key_files", b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (
        kind.encode(), base64.b64encode(content), kind.encode()
    ))  # fmt: skip


# ------------------------------------------------------------------------------------ doors and closed swarms

HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)


@FEW
@given(
    st.sampled_from([doors.PLAIN.public_key, doors.BOB.public_key.hex()]) | HEX,
    st.just(doors.NONCE.nonce) | HEX,
    st.just(doors.PLAIN.signature) | st.binary(min_size=64, max_size=64).map(bytes.hex),
    st.sampled_from([None, doors.PROVEN.proof]) | HEX,
)
def test_any_session_request(public_key: str, nonce: str, signature: str, proof: str | None) -> None:
    """Well-formed throughout; whether a door may open to it is said by the target."""
    request = {"public_key": public_key, "nonce": nonce, "signature": signature, "proof": proof}
    check("handshake", json.dumps(request).encode())


def splices(valid: bytes, most: int = 8) -> st.SearchStrategy[bytes]:
    """Valid bytes of which some lie elsewhere, are gone, or are others."""
    place = st.integers(0, len(valid))
    return st.builds(
        lambda start, length, new: valid[:start] + new + valid[start + length :],
        place, st.integers(0, most), st.binary(max_size=most),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["authorizations", "certificates", "secrets_files", "delegation_files"])
def test_any_splice(name: str) -> None:
    @FEW
    @given(st.sampled_from(sorted(load(name).seeds().values())).flatmap(splices))
    def run(data: bytes) -> None:
        check(name, data)

    run()


@FEW
@given(
    st.integers(0, 2) | st.just(1),
    st.sampled_from(["", "ffn.", "ffn.3.", "ffn.03.", "ffn", "ffn.\n", "é."]) | st.text(max_size=8),
    st.sampled_from([each.expires_at_ms for each in swarms.GIVEN.values()]) | st.integers(-1, 2**64 - 1),
    st.sampled_from([each.signature for each in swarms.GIVEN.values()]) | st.binary(min_size=63, max_size=65),
    st.binary(max_size=8) | st.just(bytes(901)),
)
def test_any_delegation(version: int, scope: str, expires_at: int, signature: bytes, payload: bytes) -> None:
    check("delegations", msgspec.msgpack.encode([[version, scope, expires_at, signature], payload]))


@FEW
@given(st.lists(st.sampled_from(sorted(swarms.SEALED)), max_size=12))
def test_sealed_datagrams_in_any_order_and_number_open_once_each(names: list[tuple[int, int]]) -> None:
    check("sealed_datagrams", join_datagrams([(0, swarms.SEALED[name]) for name in names]))


@FEW
@given(st.sampled_from(sorted(swarms.SEALED.values())).flatmap(splices))
def test_a_sealed_datagram_of_which_a_bit_changed_never_opens(data: bytes) -> None:
    check("sealed_datagrams", join_datagrams([(0, data)]))


def test_what_members_sealed_opens() -> None:
    said = {name: load("sealed_datagrams").run(data) for name, data in load("sealed_datagrams").seeds().items()}
    assert said["in-order"] == "3 0 3"
    assert said["replayed"] == "2 3 5"


def test_the_doors_open_to_whom_they_should() -> None:
    seeds, run = load("handshake").seeds(), load("handshake").run
    assert run(seeds["request"]).startswith("open AccessDeniedError")
    assert run(seeds["request-with-proof"]).startswith("open open AccessDeniedError")
    assert (run(seeds["nonce"]), run(seeds["token"])) == ("nonce", "token")


# --------------------------------------------------------------------------------------------- JSON tensors


def nest(flat: list[Any], shape: list[int]) -> Any:
    if len(shape) < 2:
        return flat
    size = math.prod(shape[1:])
    return [nest(flat[index * size : (index + 1) * size], shape[1:]) for index in range(shape[0])]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.sampled_from(sorted(DATATYPE_TO_DTYPE)), st.data())
def test_json_tensors_are_what_their_values_say(shape: list[int], datatype: str, data: st.DataObject) -> None:
    dtype = DATATYPE_TO_DTYPE[datatype]
    of_dtype = {"BOOL": st.booleans(), "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False)}
    leaf = of_dtype.get(datatype, st.integers(0, 100))
    flat = data.draw(st.lists(leaf, min_size=math.prod(shape), max_size=math.prod(shape)))
    written = nest(flat, shape) if data.draw(st.booleans()) else flat
    text = json.dumps(written, indent=data.draw(st.sampled_from([None, 1])))
    header = TensorHeader("0", datatype, tuple(shape), data=msgspec.Raw(text.encode()))
    read = tensor_from_json(header, frame_limits(LIMITS))
    assert read.dtype is dtype
    assert torch.equal(read, torch.tensor(flat, dtype=dtype).reshape(shape))


@given(st.lists(st.integers(0, 3), max_size=3), values)
def test_json_tensors_of_anything_are_refused_or_have_their_shape(shape: list[int], value: Any) -> None:
    header = TensorHeader("0", "FP64", tuple(shape), data=msgspec.Raw(json.dumps(value).encode()))
    try:
        read = tensor_from_json(header, frame_limits(LIMITS))
    except (DecodeError, CallError):
        return
    assert read.shape == tuple(shape)


def test_a_long_tensor_is_read_over_the_borders_of_pieces() -> None:
    flat = [index / 7 for index in range(20_000)]
    header = TensorHeader("0", "FP64", (20_000,), data=msgspec.Raw(json.dumps(flat).encode()))
    assert tensor_from_json(header, frame_limits(LIMITS)).tolist() == flat


# ------------------------------------------------------------------------------------------------ documents


@given(values)
def test_documents_are_their_values(value: Any) -> None:
    text = json.dumps(value).encode()
    try:
        assert decode_document(text) == msgspec.json.decode(text)
    except DecodeError:
        with pytest.raises(msgspec.DecodeError):
            msgspec.json.decode(text)


@pytest.mark.parametrize(
    "text",
    [
        b'"%b"' % (b"a" * MAX_DOCUMENT_BYTES),
        b"[" + b"[]," * MAX_DOCUMENT_VALUES + b"[]]",
        b"[" * 100_000,
        b"\xff",
        b"",
        b"NaN",
    ],
)
def test_a_document_too_large_too_deep_or_no_json_is_a_decode_error(text: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_document(text)


# --------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "text",
    [
        "[experts.options]\na = " + "[" * MAX_CONFIG_DEPTH + "]" * MAX_CONFIG_DEPTH,
        "a = " + "[" * 5000,
        "a." * 1500 + "b = 1",
        "a." * 32 + "b = 1",
        "[" + '"a" . ' * 2000 + "b]",
        "experts.options = { " + "a." * 2000 + "b = 1 }",
        "[dht]\nttl_s = " + "9" * 5000,
        "[dht]\nttl_s = nan",
        "[dht]\nttl_s = inf",
        "[experts]\noptions = { a = 1979-05-27 }",
        '"a\\nb" = 1',
    ],
)
def test_odd_toml_is_one_config_error_of_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NodeConfig.parse(text)
    assert str(caught.value).isprintable()


def test_many_uids_on_one_line_are_no_deep_key() -> None:
    uids = [f"ffn.{first}.{second}" for first in range(64) for second in range(64)]
    assert NodeConfig.parse(f"[experts]\nuids = {json.dumps(uids)}").experts.uids == tuple(uids)


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text("#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="longer than"):
        NodeConfig.load(path)
    path.write_text("#" * MAX_CONFIG_BYTES)
    assert NodeConfig.load(path) == NodeConfig()


@FEW
@given(st.dictionaries(st.text(max_size=3), scalars.filter(lambda value: value is not None), max_size=3))
def test_options_come_back_as_they_were_written(options: dict[str, Any]) -> None:
    tree = {"experts": {"options": options}}
    assert NodeConfig.from_tree(tree).experts.options == options


# ------------------------------------------------------------------------------------------ what is on disk


def test_a_key_that_the_library_itself_stumbles_over_is_an_identity_error(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text(
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VxBCIEICvYBsl/DgCvGh/DMo+nY6kmlyPI24+sT5OvcdsYbW6Q\n"
        "-----END PRIVATE KEY-----\n"
    )
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="no unencrypted PEM private key"):
        Identity.load(path)


def test_the_dht_forgets_addresses_that_would_be_looked_up_and_sequences_of_another_age(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    peers = [["192.0.2.1", 7], ["localhost", 1], ["example.org", 2], ["1.2.3.4\0", 3], ["::ffff:1.2.3.4", 4]]
    peers += [["0.0.0.0", 5], ["224.0.0.1", 6], ["2001:DB8:0::1", 8], ["fe80::1%eth0", 9], ["127.1", 10]]
    path.write_text(json.dumps({"peers": peers, "sequence": 1000}))
    kept = (("192.0.2.1", 7), ("2001:db8::1", 8))
    assert load_state(path, max_sequence=1000) == SavedState(kept, 1000)
    assert load_state(path, max_sequence=999) == SavedState(kept, 0)


# ---------------------------------------------------------------------------------- hosts and words of peers


@given(st.text(alphabet="ab-_.:09", max_size=70) | st.sampled_from(["a" * 63, "a" * 64, "::1", "1.2.3.4"]))
def test_a_host_of_a_record_never_surprises_the_resolver(host: str) -> None:
    wire = [1, 0, host, 1, b"\0", 0, 0, b"\0"]
    try:
        bundle = decode_bundle(msgspec.msgpack.encode(wire), b"")
    except DecodeError:
        return
    bundle.endpoint.host.encode("idna")
    assert decode_bundle(encode_bundle(bundle), b"") == bundle


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "2001:db8::1", "node-1.example.org", "localhost", "my_host", "a"])
def test_usual_hosts_are_announced(host: str) -> None:
    assert decode_bundle(encode_bundle(Bundle(Endpoint(host, 1), "00", (0,))), b"").endpoint.host == host


@given(st.text())
def test_a_peers_words_are_one_printable_line(text: str) -> None:
    assert str(call_error(500, text)).isprintable()
    assert len(shown(text * 100)) <= MAX_MESSAGE_CHARS


def test_printable_words_stay_as_they_are() -> None:
    assert shown("zu groß: 3 × 4") == "zu groß: 3 × 4"
    assert "\x1b" not in shown("\x1b]0;owned\x07")
