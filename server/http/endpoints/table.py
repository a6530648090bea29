"""The table of endpoints.  Routes, /docs, access, admission, metrics, logs and batch files follow from it.

A new endpoint is a row here, its handler and its schemas; docs/design/adding.md says how to add one.
"""

from collections.abc import Iterable
from typing import Any

from persimmon.server.http.endpoints.adept import adept
from persimmon.server.http.endpoints.chat import chat_completions
from persimmon.server.http.endpoints.classify import classify_texts, classify_tokens
from persimmon.server.http.endpoints.completions import completions
from persimmon.server.http.endpoints.embeddings import create_embeddings
from persimmon.server.http.endpoints.endpoint import Endpoint
from persimmon.server.http.endpoints.status import healthy, live, metrics, model, models, ready, server_version
from persimmon.server.http.endpoints.tokens import detokenize, tokenize
from persimmon.server.http.schemas.adept import AdeptRequest
from persimmon.server.http.schemas.chat import ChatCompletionRequest
from persimmon.server.http.schemas.classify import ClassifyRequest
from persimmon.server.http.schemas.completions import CompletionRequest
from persimmon.server.http.schemas.embeddings import EmbeddingRequest
from persimmon.server.http.schemas.tokens import DetokenizeRequest, TokenizeRequest

METRICS = "/metrics"

ENDPOINTS: tuple[Endpoint[Any], ...] = (
    Endpoint(
        method="POST",
        path="/v1/completions",
        request=CompletionRequest,
        handler=completions,
        uses_engine=True,
        generates=True,
        in_batch_files=True,
    ),
    Endpoint(
        method="POST",
        path="/v1/chat/completions",
        request=ChatCompletionRequest,
        handler=chat_completions,
        uses_engine=True,
        generates=True,
        in_batch_files=True,
    ),
    Endpoint(method="PUT", path="/api", request=AdeptRequest, handler=adept, uses_engine=True, generates=True),
    Endpoint(
        method="POST",
        path="/v1/embeddings",
        request=EmbeddingRequest,
        handler=create_embeddings,
        uses_engine=True,
        in_batch_files=True,
    ),
    Endpoint(method="POST", path="/classify", request=ClassifyRequest, handler=classify_texts, uses_engine=True),
    Endpoint(
        method="POST", path="/classify/tokens", request=ClassifyRequest, handler=classify_tokens, uses_engine=True
    ),
    Endpoint(method="POST", path="/tokenize", request=TokenizeRequest, handler=tokenize),
    Endpoint(method="POST", path="/detokenize", request=DetokenizeRequest, handler=detokenize),
    Endpoint(method="GET", path="/v1/models", request=None, handler=models),
    Endpoint(method="GET", path="/v1/models/{name:path}", request=None, handler=model),
    Endpoint(
        method="GET",
        path="/livez",
        request=None,
        handler=live,
        statuses=(200,),
        open_without_key=True,
        answered_at_once=True,
        polled=True,
    ),
    Endpoint(
        method="GET",
        path="/readyz",
        request=None,
        handler=ready,
        statuses=(200, 503),
        open_without_key=True,
        answered_at_once=True,
        polled=True,
    ),
    Endpoint(
        method="GET",
        path="/health",
        request=None,
        handler=ready,
        statuses=(200, 503),
        open_without_key=True,
        answered_at_once=True,
        polled=True,
    ),
    Endpoint(
        method="GET",
        path="/healthz",
        request=None,
        handler=healthy,
        statuses=(200, 503),
        open_without_key=True,
        answered_at_once=True,
        polled=True,
    ),
    # --protect-metrics asks for a key here.
    Endpoint(method="GET", path=METRICS, request=None, handler=metrics, open_without_key=True, polled=True),
    Endpoint(
        method="GET",
        path="/version",
        request=None,
        handler=server_version,
        open_without_key=True,
        answered_at_once=True,
    ),
)
"""Every endpoint, in the order of /docs."""


def addresses(endpoints: Iterable[Endpoint[Any]]) -> tuple[str, ...]:
    """The paths of endpoints that have one address each: those without parameters."""
    return tuple(endpoint.path for endpoint in endpoints if "{" not in endpoint.path)


def batch_urls(endpoints: Iterable[Endpoint[Any]]) -> tuple[str, ...]:
    """What a line of a batch file may ask for."""
    return tuple(sorted(endpoint.path for endpoint in endpoints if endpoint.in_batch_files))
