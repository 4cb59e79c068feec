"""Structured log lines on standard error, as text or JSON. Knows nothing of who logs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final

from p2pmoe.config import LogConfig

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO node: joined peers=3`: what was passed as `extra` comes last."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = "".join(f" {key}={_shown(value)}" for key, value in _extra(record).items())
        line = f"{_time(record)} {record.levelname} {_source(record)}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line with time, level, source, message, and what was passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        document = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "source": _source(record),
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


class StandardErrorHandler(logging.Handler):
    """Writes to whatever standard error is now: a live display may stand in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - a log line must not end the node
            self.handleError(record)


def set_up_logs(config: LogConfig) -> None:
    """Log p2pmoe at the configured level, other packages from warnings on. Replaces earlier handlers."""
    handler = StandardErrorHandler()
    handler.setFormatter(JsonFormatter() if config.format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("p2pmoe").setLevel(config.level.upper())
    logging.captureWarnings(capture=True)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _source(record: logging.LogRecord) -> str:
    return record.name.removeprefix("p2pmoe.")


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _shown(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(character in text for character in ' "=\n') else text
