"""Standard output and error in every encoding, closed, full and broken; arguments that are no text."""

import io
import logging
import sys
from pathlib import Path

import pytest
from test_cli_commands import COMMANDS, _a_process_of_its_own  # noqa: F401 - the fixture is used by its name
from test_cli_progress import snapshot
from test_cli_survey import ALICE, DOCUMENT, record

from p2pmoe.cli.logs import set_up_logs
from p2pmoe.cli.lookup import make_view
from p2pmoe.cli.main import main
from p2pmoe.cli.output import open_console, print_json
from p2pmoe.cli.progress import open_display
from p2pmoe.cli.survey import Sighting
from p2pmoe.cli.terminal import complain, finish_streams, legible, prepare_streams, text_of
from p2pmoe.config import LogConfig

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "cp037", "koi8-r", "shift_jis", "utf-16", "utf-8-sig", "utf-8"]
WRONG_LINES = [
    ["bogus→"],
    ["--→"],
    ["lookup", "…"],
    ["lookup", "ffn", "--initial-peers", "→"],
    ["train", "→", "--initial-peers", "127.0.0.1:1"],
    ["train", "digits", "--initial-peers", "127.0.0.1:1", "--grid", "–"],
    ["node", "-c", "ключ–中.toml"],
    ["node", "--log-level", "→"],
    ["id", "show", "→中.pem"],
    ["id", "delegate", "→", "→"],
    ["demo", "--grid", "→"],
]


class Streams:
    """Standard output and error in an encoding, kept as bytes."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        self.out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
        self.err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    def text(self, stream: io.TextIOWrapper) -> str:
        stream.flush()
        assert isinstance(stream.buffer, io.BytesIO)
        return stream.buffer.getvalue().decode(self.encoding)

    def put_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the test itself: pytest puts its own on before."""
        monkeypatch.setattr(sys, "stdout", self.out)
        monkeypatch.setattr(sys, "stderr", self.err)


@pytest.fixture(params=ENCODINGS)
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Streams:
    monkeypatch.chdir(tmp_path)
    return Streams(request.param)


def test_help_in_every_encoding(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.put_on(monkeypatch)
    shown = COMMANDS if streams.encoding in ("ascii", "cp437", "utf-16") else ["lookup", "node"]
    for command in ("", *shown):
        assert main([*command.split(), "--help"]) == 0, (command, streams.text(streams.err))
    assert streams.text(streams.out).count("Usage: p2pmoe") == 1 + len(shown)
    assert streams.text(streams.err) == ""


def test_every_error_in_every_encoding(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.put_on(monkeypatch)
    for line in WRONG_LINES:
        assert main(line) in (2, 3, 4), line
    said = streams.text(streams.err).splitlines()
    assert len(said) == len(WRONG_LINES)
    assert all(each.startswith("error: ") and "Unicode" not in each for each in said), said


def test_tables_bars_and_logs_in_every_encoding(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.put_on(monkeypatch)
    prepare_streams()
    schema = {"forward": DOCUMENT["forward_schema"], "outputs": DOCUMENT["outputs_schema"]}
    sightings = [Sighting(record(f"ffn.{each}.1", ALICE), schema, 1.5, 104.5) for each in range(3)]
    open_console().print(make_view("ffn.→", sightings, tree=False))
    open_console().print(make_view("ffn.→", sightings, tree=True))
    with open_display(open_console(), 2, lambda: 16) as display:
        display.show(snapshot(2))
    print_json({"uid": "→…中"})
    set_up_logs(LogConfig())
    logging.getLogger("p2pmoe.test").warning("it is → … 中 \udcff", extra={"where": "→"})

    shown = streams.text(streams.out)
    arrow = "→" if streams.encoding.startswith("utf") or streams.encoding == "shift_jis" else ">"
    assert f"BOOL[64] {arrow} FP32[64]" in shown
    assert '{"uid": "\\u2192\\u2026\\u4e2d"}' in shown
    assert "step=2/2" in shown
    assert "it is " in streams.text(streams.err)
    assert "Traceback" not in streams.text(streams.err)


def test_what_an_encoding_lacks_becomes_something_legible() -> None:
    text = "“a” – b → c… × 中 \U0001f600 \udcff ─│┌"
    assert (
        text.encode("ascii", "p2pmoe-legible")
        == rb"""
"a" - b > c... x \u4e2d \U0001f600 \udcff -|+
""".strip()
    )
    assert text.encode("latin-1", "p2pmoe-legible").decode("latin-1").startswith('"a" - b > c... × ')
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", "p2pmoe-legible")


def test_a_line_for_a_terminal_has_no_control_characters() -> None:
    assert legible("a\nb\x1b[2J \udcff \u202e→") == r"a b\x1b[2J \udcff \u202e→"


def test_an_exception_without_text_is_reported_all_the_same() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert text_of(MuteError()) == "(no text: its __str__ raised RuntimeError)"
    assert text_of(ValueError("x")) == "x"


class BrokenStream(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("closed file")])
def test_an_error_nobody_reads_keeps_its_exit_code(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", BrokenStream(error))

    assert main(["bogus"]) == 2
    complain("nobody hears this")
    assert finish_streams() is False


def test_a_stream_that_is_not_there_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    assert main(["version"]) == 0
    assert main(["bogus"]) == 2
    for stream in (sys.stdout, sys.stderr):
        assert stream.name == "/dev/null" or sys.platform == "win32"
        stream.close()


@pytest.mark.parametrize(
    "line",
    [
        ["lookup", "\udcff"],
        ["lookup", "ffn", "--swarm-id", "\udcff"],
        ["lookup", "ffn", "--initial-peers", "\udcff"],
        ["node", "--swarm-id=\udcff"],
        ["node", "-c", "\udcff"],
        ["node", "--identity", "a\udcff.pem"],
        ["node", "--kind", "\udcff"],
        ["train", "\udcff"],
        ["id", "new", "\udcff"],
        ["--\udcff"],
        ["\udcff"],
    ],
)
def test_an_argument_that_is_no_text_is_wrong_usage(
    line: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(line) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "is no text in this locale's encoding" in captured.err
    assert r"\udcff" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_variable_that_is_no_text_is_a_wrong_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("P2PMOE_DHT_SWARM_ID", "P2PMOE_IDENTITY_PATH", "P2PMOE_DHT_INITIAL_PEERS", "P2PMOE_DHT_PORT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "\udcff")
            assert main(["node"]) == 3
            said = capsys.readouterr().err
            assert said.startswith(f"error: {name}: "), said
            assert said.count("\n") == 1


def test_control_characters_of_an_argument_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lookup", "\x1b[2J"]) == 2
    assert capsys.readouterr().err.startswith(r"error: '\x1b[2J' is no pattern")
