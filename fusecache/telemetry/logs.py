"""Structured logs: one line per event, text or JSON, without secrets, repeated ones rate-limited.

Modules log through `logging.getLogger(__name__)` with lazy arguments; the items of `extra` become fields of the line.
structlog renders every line here. A secret is taken out of the rendered line, so that it does not matter how it came in
(message, field, exception, the repr of a URL).
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Literal, TextIO
from urllib.parse import quote, quote_plus

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from fusecache.bounded import BoundedDict
from fusecache.errors import ConfigError

REDACTED = "[secret]"
HANDLER_NAME = "fusecache"
BURST_EVENTS = 5
BURST_WINDOW_SECONDS = 60.0
"""At most so many equal events (same logger, level and message text before its arguments) in so many seconds."""
_MAX_EVENT_KINDS = 1024
_OWN_LOGGERS = ("fusecache", "__main__")


def configure_logging(
    level: Literal["debug", "info", "warning", "error"] = "info",
    log_format: Literal["text", "json"] = "text",
    *,
    file: Path | None = None,
    stream: TextIO | None = None,
    secrets: Iterable[str] = (),
) -> None:
    """Send the logs of this process to `file` (appended; reopened when it is rotated away), else to `stream`,
    else to stderr. Replaces an earlier configuration. Libraries log from WARNING on only: some of them
    write credentials at DEBUG. Raises ConfigError when the file can't be opened."""
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(stream or sys.stderr)
    else:
        try:
            handler = _PrivateFileHandler(file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"log_file {file}: {error.strerror}") from error
    handler.setFormatter(make_formatter(log_format, secrets))
    handler.addFilter(RepeatFilter())
    handler.set_name(HANDLER_NAME)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if old.get_name() == HANDLER_NAME:
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(level.upper())
    # A full disk below the log must not print tracebacks into whatever stderr is.
    logging.raiseExceptions = False


class _PrivateFileHandler(logging.handlers.WatchedFileHandler):
    """Makes a new log with mode 0600: object names are for the user of the mount only."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return TextIOWrapper(open(descriptor, "ab"), encoding=self.encoding, errors=self.errors)


def make_formatter(log_format: Literal["text", "json"], secrets: Iterable[str]) -> logging.Formatter:
    """A formatter for any handler of the standard library."""
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _one_line_exception,
    ]
    render = _render_json if log_format == "json" else _render_text
    inner = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        keep_exc_info=False,
        use_get_message=True,
    )
    return _RedactingFormatter(inner, secrets)


class _RedactingFormatter(logging.Formatter):
    def __init__(self, inner: logging.Formatter, secrets: Iterable[str]) -> None:
        super().__init__()
        self._inner = inner
        forms: set[str] = set()
        for secret in secrets:
            if len(secret) >= 4:  # shorter ones would black out ordinary words
                forms |= {secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]}
                forms.add(repr(secret)[1:-1])
        self._secret_forms = sorted(forms, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        line = self._inner.format(record)
        for form in self._secret_forms:
            line = line.replace(form, REDACTED)
        return line


def _one_line_exception(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    for added in ("message", "asctime", "taskName"):  # by another handler's formatter, not by the caller
        event.pop(added, None)
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        event["error"] = "".join(traceback.format_exception_only(error)).strip()
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        event["at"] = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    return event


def _render_json(logger: WrappedLogger, name: str, event: EventDict) -> str:
    ordered = {key: event.pop(key) for key in ("timestamp", "level", "logger", "event") if key in event}
    return json.dumps({**ordered, **event}, default=str, ensure_ascii=False)


def _render_text(logger: WrappedLogger, name: str, event: EventDict) -> str:
    origin = f"{event.pop('timestamp')} {event.pop('level'):<7} {event.pop('logger')}"
    head = f"{origin}: {_escape_control(event.pop('event'))}"
    return head + "".join(f" {key}={_quote_value(value)}" for key, value in event.items())


def _escape_control(value: object) -> str:
    """Control characters escaped: a file name with a newline must not forge a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def _quote_value(value: object) -> str:
    text = _escape_control(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in " =\"'") else text


@dataclass
class _BurstWindow:
    """The counts of one kind of event since `started`."""

    started: float
    passed: int = 0
    held_back: int = 0


class RepeatFilter(logging.Filter):
    """Lets BURST_EVENTS equal events per BURST_WINDOW_SECONDS pass, and notes in the next one that passes how many it
    held back. Thread-safe; remembers at most _MAX_EVENT_KINDS kinds of events. The lock is a leaf.

    | What happens | The kind's window |
    |---|---|
    | its first event, or an event after the window's end | begins |
    | one of the first BURST_EVENTS events of a window | counts it as passed |
    | another event of the window | counts it as held back |
    | events of _MAX_EVENT_KINDS other kinds | is forgotten |
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: BoundedDict[tuple[str, int, str], _BurstWindow] = BoundedDict(_MAX_EVENT_KINDS)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the record. Sets its field `repeats_held_back` if a window ended that held events back."""
        if record.levelno <= logging.DEBUG:
            return True
        key = (record.name, record.levelno, str(record.msg))
        now = self._clock()
        with self._lock:
            window = self._windows.get(key) or _BurstWindow(now)
            if now - window.started >= BURST_WINDOW_SECONDS:
                if window.held_back:
                    record.repeats_held_back = window.held_back
                window = _BurstWindow(now)
            self._windows[key] = window
            if window.passed < BURST_EVENTS:
                window.passed += 1
                return True
            window.held_back += 1
            return False
