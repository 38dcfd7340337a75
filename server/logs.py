"""The log: one line a record, as text or as JSON, with nothing in it that could pass for another line.

Nothing here knows of prompts or keys, and nothing that knows of them logs: what a client chose reaches a record only as
an id that was checked or as a name from a closed list. What escapes all the same, such as the text of an exception of a
library, is escaped and cut.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

MAX_LINE_BYTES = 8192
_MAX_MESSAGE_BYTES = 2048
_MAX_TRACE_BYTES = 4096
# Line ends of all kinds, the escapes of terminals, and halves of pairs, which no stream can write.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def configure_logs(level: str, log_format: LogFormat) -> None:
    """Write records of this level and above to stderr; a process that has handlers already keeps them.

    Args:
        level: name of the lowest level, such as "info".
        log_format: of the lines.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(_is_news)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if log_format == "json":
        logging.captureWarnings(True)


def escaped(text: str) -> str:
    """Return a text without line ends and control characters, which are written as escapes."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record tells something new: that a client has gone, the line of its request tells, with status 499.

    asyncio warns of frames that are written, several in one step of the event loop, after the socket has failed and
    before the protocol hears of it (`connection_lost`); from then on uvicorn writes none.
    """
    return not (record.name == "asyncio" and record.msg == "socket.send() raised exception.")


class TextFormatter(logging.Formatter):
    """Time, level, logger and message on one line; the lines of a traceback follow, each indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record, at most `MAX_LINE_BYTES` long."""
        head = f"{self.formatTime(record)} {record.levelname} {record.name} "
        line = head + _cut(escaped(record.getMessage()), _MAX_MESSAGE_BYTES)
        if not record.exc_info:
            return line
        trace = "\n".join(
            f"    {escaped(each)}" for each in self.formatException(record.exc_info).splitlines()
        )
        return f"{line}\n    {_cut(trace, _MAX_TRACE_BYTES, keep_end=True).lstrip()}"


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, then the fields of the record or its message, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, at most `MAX_LINE_BYTES` long."""
        shown: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            shown |= fields
        else:
            shown["message"] = _cut(escaped(record.getMessage()), _MAX_MESSAGE_BYTES)
        if record.exc_info:
            trace = "\n".join(escaped(each) for each in self.formatException(record.exc_info).splitlines())
            shown["exception"] = _cut(trace, _MAX_TRACE_BYTES, keep_end=True)
        return json.dumps(shown)


def _cut(text: str, max_bytes: int, *, keep_end: bool = False) -> str:
    """Return a text of at most so many bytes, in JSON as in UTF-8; what is left out is marked.

    Args:
        text: any text.
        max_bytes: of its form in JSON, at least 100.
        keep_end: leave out the beginning.
    """
    size = len(json.dumps(text))
    if size <= max_bytes:
        return text
    while size > max_bytes - 8:
        length = min(len(text) * (max_bytes - 8) // size, len(text) - 1)
        text = text[len(text) - length :] if keep_end else text[:length]
        size = len(json.dumps(text))
    return f"...{text}" if keep_end else f"{text}..."
