"""Log lines as text and as JSON."""

import json
import logging
import sys

import pytest

from p2pmoe.cli.logs import JsonFormatter, StandardErrorHandler, TextFormatter


def make_record(message: str = "joined %d", **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("p2pmoe.dht.node", logging.INFO, __file__, 1, message, (3,), None)
    record.created = 1_700_000_000.25
    vars(record).update(extra)
    return record


def test_a_text_line_ends_with_what_was_passed_as_extra() -> None:
    line = TextFormatter().format(make_record(peers=3, why="no answer"))

    assert line == '2023-11-14T22:13:20.250Z INFO dht.node: joined 3 peers=3 why="no answer"'


def test_a_json_line_holds_the_same() -> None:
    document = json.loads(JsonFormatter().format(make_record(peers=3)))

    assert document == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "source": "dht.node",
        "message": "joined 3",
        "peers": 3,
    }


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_traceback_comes_with_an_exception(formatter: logging.Formatter) -> None:
    record = make_record()
    try:
        int("broken")
    except ValueError:
        record.exc_info = sys.exc_info()

    assert "ValueError: invalid literal" in formatter.format(record)


def test_lines_go_to_standard_error_as_it_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    handler = StandardErrorHandler()
    handler.setFormatter(TextFormatter())

    handler.emit(make_record())

    assert capsys.readouterr().err.endswith("INFO dht.node: joined 3\n")
