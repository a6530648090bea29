"""An endpoint as data: its address, what it reads, what answers it, and what the rest of the server must know of it.

Knows no endpoint by name.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from fastapi import Response
from starlette.types import Receive

from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.request_record import RequestRecord
from persimmon.server.http.schemas.request_object import RequestObject

RequestT = TypeVar("RequestT", bound=RequestObject | None)


@dataclass(frozen=True, slots=True)
class Call(Generic[RequestT]):
    """One request to an endpoint.

    Attributes:
        request: the body, valid by its type; None at an endpoint that reads no body.
        receive: the ASGI channel, the body read to the end.
        record: what is known of the request; what a handler finds out is written into it.
        path_params: the values of the path's parameters, by name.
    """

    request: RequestT
    receive: Receive
    record: RequestRecord
    path_params: Mapping[str, Any]


Handler = Callable[[Service, Call[RequestT]], Awaitable[Response]]
"""Answers a call.

Its return type is what /openapi.json describes: `JsonResponse[Struct]`, `EventStream[Struct]`, a union of both, or
another response class.  The first paragraph of its docstring is the description there, its name the operation's.

It may raise ApiError, EngineNotReadyError (the model is still loading), EngineDeadError (the engine has ended) and
ClientDisconnect (the client left before its answer was complete); each of them is answered.
"""


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[RequestT]):
    """A row of the table of endpoints.

    Attributes:
        method: HTTP's.  GET endpoints answer HEAD too.
        path: as FastAPI writes paths, parameters included.
        request: the type of the body; None for an endpoint that reads none.
        handler: answers.
        statuses: of the handler's own answers; errors are documented without being listed.
        uses_engine: whether it asks something of the engine: a full server refuses it before its body is read.
        generates: whether its answers are generated text; their time is a metric of its own.
        open_without_key: whether it is answered without a key where the server asks for keys: load balancers have none.
            vLLM's counters of HTTP requests leave these endpoints out.
        answered_at_once: whether it does not wait behind requests that came before.
        polled: whether it is asked every few seconds: it has no spans, and a line in the access log only when the
            answer changes.
        in_batch_files: whether a line of a batch file may ask for it.
    """

    method: Literal["GET", "POST", "PUT"]
    path: str
    request: type[RequestT] | None
    handler: Handler[RequestT]
    statuses: tuple[int, ...] = (200,)
    uses_engine: bool = False
    generates: bool = False
    open_without_key: bool = False
    answered_at_once: bool = False
    polled: bool = False
    in_batch_files: bool = False

    @property
    def name(self) -> str:
        """The operation's name in /openapi.json."""
        return self.handler.__name__

    @property
    def description(self) -> str:
        """What it does, for a reader of /docs."""
        return (inspect.getdoc(self.handler) or "").partition("\n\n")[0]
