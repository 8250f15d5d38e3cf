"""What each line of a process's output says besides its text: the run, the attempt, the rank and the step it is about.

Ray's own formatter for JSON lines finds them in every log record. ``RAY_LOGGING_CONFIG_ENCODING=JSON``, by which Ray
makes its lines JSON, does so for those of our commands as well.
"""

import io
import json
import logging
import os
import sys
import time
from typing import Any, TextIO

_about: dict[str, Any] = {"run": None, "attempt": None, "rank": None, "step": None}
# The names that Ray's JSON lines have.
_FIELDS = ("asctime", "levelname", "message", "filename", "lineno")


def about(**values: Any) -> None:
    """Say what the lines of this process are about from now on: ``run``, ``attempt``, ``rank`` or ``step``."""
    assert values.keys() <= _about.keys()
    _about.update(values)


def mark_records() -> None:
    """Give every log record of this process these values, whoever logs it and whatever formats it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "marks", False):
        return

    def marked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.__dict__.update(_about)
        return record

    marked.marks = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(marked)


def as_json() -> bool:
    """Return whether lines are wanted as JSON."""
    return os.environ.get("RAY_LOGGING_CONFIG_ENCODING", "").upper() == "JSON"


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        record.asctime, record.message = self.formatTime(record), record.getMessage()
        line = {name: getattr(record, name) for name in _FIELDS} | _about
        if record.exc_info:
            line["exc_text"] = self.formatException(record.exc_info)
        return json.dumps(line)


class StderrHandler(logging.Handler):
    """Prints log records where ``sys.stderr`` leads at this moment: while a table is on the terminal, above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; an output that is closed does not stop the work."""
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class JsonLines(io.TextIOBase):
    """Writes each line that is printed as one line of JSON; a line that is JSON of a logger already stays."""

    def __init__(self, stream: TextIO, level: str) -> None:
        """Write to ``stream``, with this name of a level."""
        self._stream, self._level, self._rest = stream, level, ""

    def write(self, text: str) -> int:
        """Write text, as far as its lines have ended."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            self._stream.write(line if line.startswith('{"asctime": ') else self._line(line))
            self._stream.write("\n")
        return len(text)

    def _line(self, text: str) -> str:
        now = time.time()
        asctime = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03d}"
        return json.dumps({"asctime": asctime, "levelname": self._level, "message": text.rstrip()} | _about)

    def flush(self) -> None:
        """Pass on what is there."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the descriptor behind it."""
        return self._stream.fileno()


def print_json() -> None:
    """From now on, write what this process prints as JSON lines, and have its log records say what they are about."""
    mark_records()
    for name, level in (("stdout", "INFO"), ("stderr", "ERROR")):
        if not isinstance(stream := getattr(sys, name), JsonLines):
            setattr(sys, name, JsonLines(stream, level))
