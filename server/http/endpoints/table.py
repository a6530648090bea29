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
        "POST",
        "/v1/completions",
        CompletionRequest,
        completions,
        uses_engine=True,
        generates=True,
        in_batch_files=True,
    ),
    Endpoint(
        "POST",
        "/v1/chat/completions",
        ChatCompletionRequest,
        chat_completions,
        uses_engine=True,
        generates=True,
        in_batch_files=True,
    ),
    Endpoint("PUT", "/api", AdeptRequest, adept, uses_engine=True, generates=True),
    Endpoint("POST", "/v1/embeddings", EmbeddingRequest, create_embeddings, uses_engine=True, in_batch_files=True),
    Endpoint("POST", "/classify", ClassifyRequest, classify_texts, uses_engine=True),
    Endpoint("POST", "/classify/tokens", ClassifyRequest, classify_tokens, uses_engine=True),
    Endpoint("POST", "/tokenize", TokenizeRequest, tokenize),
    Endpoint("POST", "/detokenize", DetokenizeRequest, detokenize),
    Endpoint("GET", "/v1/models", None, models),
    Endpoint("GET", "/v1/models/{name:path}", None, model),
    Endpoint("GET", "/livez", None, live, (200,), open_without_key=True, answered_at_once=True, polled=True),
    Endpoint("GET", "/readyz", None, ready, (200, 503), open_without_key=True, answered_at_once=True, polled=True),
    Endpoint("GET", "/health", None, ready, (200, 503), open_without_key=True, answered_at_once=True, polled=True),
    Endpoint("GET", "/healthz", None, healthy, (200, 503), open_without_key=True, answered_at_once=True, polled=True),
    # --protect-metrics asks for a key here.
    Endpoint("GET", METRICS, None, metrics, open_without_key=True, polled=True),
    Endpoint("GET", "/version", None, server_version, open_without_key=True, answered_at_once=True),
)
"""Every endpoint, in the order of /docs."""


def addresses(endpoints: Iterable[Endpoint[Any]]) -> tuple[str, ...]:
    """The paths of endpoints that have one address each: those without parameters."""
    return tuple(endpoint.path for endpoint in endpoints if "{" not in endpoint.path)


def batch_urls(endpoints: Iterable[Endpoint[Any]]) -> tuple[str, ...]:
    """What a line of a batch file may ask for."""
    return tuple(sorted(endpoint.path for endpoint in endpoints if endpoint.in_batch_files))
