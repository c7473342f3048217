"""One JSON line for each request, and for what happens to the server."""

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGGER = logging.getLogger("llmpress.serving")


class JsonLines(logging.Formatter):
    """Writes a record's ``data`` and message as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stdout() -> None:
    """Let the server's lines, and uvicorn's errors, go to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    for name, level in (("llmpress.serving", logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log(event: str, level: int = logging.INFO, **data: Any) -> None:
    """Log an event with what belongs to it."""
    LOGGER.log(level, event, extra={"data": data})


class RequestLog:
    """Logs each request when it has ended, with its status and what its handler noted.

    Args:
        app: Answers the requests; notes go into ``scope["state"]["notes"]``.
        counted: Called with the notes, the status and the seconds.
    """

    def __init__(self, app: ASGIApp, counted: Callable[[dict[str, Any], int, float], None]) -> None:
        self._app, self._counted = app, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        notes: dict[str, Any] = {}
        scope.setdefault("state", {})["notes"] = notes
        status = 499  # the client went away before an answer began

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - started
            place = {"method": scope["method"], "path": scope["path"], "status": status}
            log("request", **place, seconds=round(seconds, 4), **notes)
            self._counted(notes, status, seconds)
