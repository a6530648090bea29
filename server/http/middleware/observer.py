"""What happens around every request: its id, its metrics, its line in the access log, its trace, its last resort.

Knows that requests are answered, not how; what a generation found out it reads from the request's record.
"""

import functools
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from http.client import responses

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persimmon.server.http.errors import CLIENT_CLOSED_REQUEST, as_api_error
from persimmon.server.http.middleware.tracing import FinishedRequest, Tracing
from persimmon.server.http.request_record import REQUEST_ID_HEADER, RequestRecord, request_id
from persimmon.server.logs import with_fields
from persimmon.server.metrics import Metrics

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
"""The endpoint of a request that no route takes: a client's own paths would be too many for a metric's label."""

_ID_HEADER = REQUEST_ID_HEADER.encode()
_GOOD = (200, None)
_PROBE_STATUSES = (HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE)
_REASONS = {CLIENT_CLOSED_REQUEST: "The client closed the connection before the answer was complete."}
_MAX_TEXT = 300


@dataclass(slots=True)
class _Answer:
    """How far the answer is.

    Attributes:
        status: HTTP's; that of a client that left, until the answer begins.
        started: whether its status line has been sent.
        complete: whether all of it has been sent.
    """

    status: int = CLIENT_CLOSED_REQUEST
    started: bool = False
    complete: bool = False


class Observer:
    """The outermost layer of the application.

    Args:
        app: what answers.
        metrics: count every request by endpoint and status, and time those that were generated to their end.
        generating: endpoints whose answers are generated.
        probes: endpoints that are asked every few seconds.  They have no spans, and a line in the log only where an
            answer differs from the one before; the first is expected to be good.
        tracing: where requests become spans, if anywhere.
        log_prompts: whether the access log shows prompts.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        generating: Collection[str],
        probes: Collection[str],
        tracing: Tracing | None = None,
        log_prompts: bool = False,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._generating = generating
        self._last_answers: dict[str, tuple[int, str | None]] = dict.fromkeys(probes, _GOOD)
        self._tracing = tracing
        self._log_prompts = log_prompts
        # Finding a series by its labels takes longer than counting, and there are few: endpoints are routes.
        self._count = functools.cache(metrics.http_requests.labels)
        self._durations = functools.cache(metrics.request_duration.labels)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, whatever happens below."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id(scope), prompts=[] if self._log_prompts else None)
        record.attach(scope)
        own_header = (_ID_HEADER, record.request_id.encode())
        answer = _Answer()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.started = message["status"], True
                message = {**message, "headers": [*message.get("headers", ()), own_header]}
            elif not message.get("more_body", False):
                answer.complete = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            logger.exception("a request failed", extra=with_fields(request_id=record.request_id))
            if answer.started:
                raise  # the connection breaks, so that the client knows that the answer is not whole
            await as_api_error(error).response()(scope, receive, watched)
        finally:
            self._tell(scope, record, answer)

    def _tell(self, scope: Scope, record: RequestRecord, answer: _Answer) -> None:
        ended = time.perf_counter()
        endpoint = getattr(scope.get("route"), "path", UNKNOWN)
        self._count(endpoint, answer.status).inc()
        if endpoint not in self._last_answers:
            self._durations(endpoint).observe(ended - record.arrival)
        if answer.complete and answer.status == 200 and endpoint in self._generating:
            self._metrics.request_latency.observe(ended - record.arrival)
        probed = endpoint in self._last_answers and answer.status in _PROBE_STATUSES
        if logger.isEnabledFor(logging.INFO) and not (probed and self._is_repeated(endpoint, answer, record)):
            self._log(scope, record, answer, ended)
        if self._tracing is not None and not probed:
            headers = Headers(scope=scope)
            self._tracing.add(
                FinishedRequest(
                    record=record,
                    method=scope["method"],
                    endpoint=endpoint,
                    status=answer.status,
                    headers=headers,
                    ended=ended,
                )
            )

    def _is_repeated(self, endpoint: str, answer: _Answer, record: RequestRecord) -> bool:
        now = (answer.status, record.error)
        before, self._last_answers[endpoint] = self._last_answers[endpoint], now
        return now == before

    def _log(self, scope: Scope, record: RequestRecord, answer: _Answer, ended: float) -> None:
        client = scope.get("client")
        generated = record.prompt_tokens > 0
        fields = with_fields(
            request_id=record.request_id,
            method=scope["method"],
            # Without the query, and percent-encoded as it came: nothing in it can end a line.
            path=scope.get("raw_path", b"").decode("ascii", "backslashreplace"),
            status=answer.status,
            error=_bounded(record.error or _unexplained(answer.status)),
            param=_bounded(record.error_param),
            duration=_rounded(ended - record.arrival),
            ttft=_rounded(record.time_to_first_token),
            queued=_rounded(record.queue_seconds),
            prompt_tokens=record.prompt_tokens if generated else None,
            cached_tokens=record.cached_tokens if generated else None,
            output_tokens=record.output_tokens if generated else None,
            finish_reason=record.finish_reason,
            complete=None if answer.complete else False,
            key=record.key,
            client=client[0] if client else None,
            prompts=record.prompts or None,
        )
        logger.info("request", extra=fields)


def _unexplained(status: int) -> str | None:
    """Why a request failed, where nothing but the status is known; None where it did not fail."""
    if status < 400:
        return None
    return _REASONS.get(status) or responses.get(status, f"HTTP {status}")


def _bounded(text: str | None) -> str | None:
    return text if text is None or len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
