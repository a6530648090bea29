"""The lines of a batch file and of its answers, in OpenAI's format.

Knows what a line may hold; neither the files nor what the bodies mean.
"""

import uuid
from hashlib import blake2b

import msgspec
from msgspec import Raw, Struct

from persimmon.server.http.endpoints.table import ENDPOINTS, batch_urls

URLS = batch_urls(ENDPOINTS)
"""What a line may ask for."""

ANSWER_START = b'{"id":"batch_req_'
"""How every line that `encode` writes begins."""


class BatchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the input.

    Attributes:
        custom_id: the line's name, which its answer bears.
        method: "POST".
        url: one of URLS.
        body: the request's body, as it stands in the file.
    """

    custom_id: str
    method: str
    url: str
    body: Raw

    @property
    def body_bytes(self) -> bytes:
        """The body, apart from the line that it came in."""
        return bytes(self.body)


class BatchResponse(Struct, frozen=True):
    """What the endpoint answered, be it an error.

    Attributes:
        status_code: HTTP's.
        request_id: for logs; unique.
        body: the JSON body.
    """

    status_code: int
    request_id: str
    body: Raw


class BatchError(Struct, frozen=True):
    """Why a line reached no endpoint.

    Attributes:
        code: a word for programs.
        message: a sentence for a person.
        line: the line's number in the input, from 1.
    """

    code: str
    message: str
    line: int | None = None


class BatchAnswer(Struct, frozen=True):
    """A line of the output: a response or an error.

    Attributes:
        id: unique.
        custom_id: of the line that it answers; None where that has none that can be read.
        response: what the endpoint answered.
        error: why there is no response.
    """

    id: str
    custom_id: str | None
    response: BatchResponse | None
    error: BatchError | None

    @property
    def failed(self) -> bool:
        """Whether the line did not get what it asked for."""
        return self.response is None or self.response.status_code != 200

    @property
    def failure(self) -> str:
        """Why a line failed: a sentence for a person."""
        if self.error is not None:
            return self.error.message
        if self.response is None:
            return "There is no response."
        try:
            return _failure_decoder.decode(self.response.body).error.message
        except _UNREADABLE:
            return f"The status is {self.response.status_code}."


class LineError(ValueError):
    """A line that no endpoint can be asked with.

    Attributes:
        answer: what stands in the output for it.
    """

    def __init__(self, line: int, custom_id: str | None, code: str, message: str) -> None:
        super().__init__(message)
        self.answer = BatchAnswer(
            id=_unique("batch_req"), custom_id=custom_id, response=None, error=BatchError(code, message, line)
        )


class _Failure(Struct):
    message: str


class _Failed(Struct):
    error: _Failure


class _Named(Struct):
    custom_id: str


class _Streamed(Struct):
    stream: object = None


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_request_decoder = msgspec.json.Decoder(BatchRequest)
_name_decoder = msgspec.json.Decoder(_Named)
_stream_decoder = msgspec.json.Decoder(_Streamed)
_answer_decoder = msgspec.json.Decoder(BatchAnswer)
_failure_decoder = msgspec.json.Decoder(_Failed)
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])
_encoder = msgspec.json.Encoder()


def custom_id(text: bytes) -> str | None:
    """The custom_id of a line of the input; None where none can be read."""
    try:
        return _name_decoder.decode(text).custom_id
    except _UNREADABLE:
        return None


def key(name: str | None, line: int | None) -> bytes:
    """16 bytes that a line is remembered by: those of its custom_id, or of its number where it has none."""
    identity = f"line {line}" if name is None else f"id {name}"
    return blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_request(text: bytes, line: int) -> BatchRequest:
    """The request in a line of the input.

    Args:
        text: the line.
        line: its number, from 1.

    Raises:
        LineError: it is none, or one that cannot be run here.
    """
    try:
        request = _request_decoder.decode(text)
    except msgspec.ValidationError as error:
        message = f"The line is not a batch request: {error}."
        raise LineError(line=line, custom_id=custom_id(text), code="invalid_line", message=message) from None
    except UnicodeDecodeError as error:
        message = f"The line is not valid UTF-8 ({error.reason}); save the file as UTF-8."
        raise LineError(line=line, custom_id=None, code="invalid_json", message=message) from None
    except _UNREADABLE as error:
        raise LineError(
            line=line, custom_id=None, code="invalid_json", message=f"The line is not valid JSON: {error}."
        ) from None
    if request.url not in URLS:
        message = f"Unknown url {request.url!r}; use one of {', '.join(URLS)}."
        raise LineError(line=line, custom_id=request.custom_id, code="invalid_url", message=message)
    if request.method != "POST":
        message = f"Unknown method {request.method!r}; send 'POST'."
        raise LineError(line=line, custom_id=request.custom_id, code="invalid_method", message=message)
    if _streamed(request.body):
        message = "A batch line's answer cannot be streamed; leave 'stream' out."
        raise LineError(line=line, custom_id=request.custom_id, code="stream_not_supported", message=message)
    return request


def without_model(body: bytes) -> bytes:
    """A request's body without the name of a model, which any server answers with the model that it serves."""
    try:
        fields = _fields_decoder.decode(body)
    except _UNREADABLE:  # not an object; the endpoint's error says so
        return body
    fields.pop("model", None)
    return _encoder.encode(fields)


def _streamed(body: Raw) -> bool:
    try:
        return _stream_decoder.decode(body).stream is True
    except _UNREADABLE:  # no object; the endpoint says so better
        return False


def respond(request: BatchRequest, status_code: int, body: bytes) -> BatchAnswer:
    """The line that answers a request with what its endpoint said."""
    response = BatchResponse(status_code, _unique("req"), Raw(body))
    return BatchAnswer(id=_unique("batch_req"), custom_id=request.custom_id, response=response, error=None)


def encode(answer: BatchAnswer) -> bytes:
    """An answer as a line of the output, with its end."""
    return _encoder.encode(answer) + b"\n"


def read_answer(text: bytes) -> BatchAnswer:
    """The answer in a line of the output.

    Raises:
        ValueError: it is none.
    """
    try:
        answer = _answer_decoder.decode(text)
    except _UNREADABLE as error:
        raise ValueError(str(error)) from None
    if answer.custom_id is None and (answer.error is None or answer.error.line is None):
        raise ValueError("it has neither a custom_id nor a line number")
    return answer


def _unique(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
