"""How the API workers serve HTTP, and how much they take on."""

from typing import Any

from pydantic import field_validator

from persimmon.server.settings.media import MediaLimits
from persimmon.server.settings.section import Section, setting


class HttpSettings(Section):
    """Settings of the API workers, and of the supervisor that starts and watches them."""

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces.", "http", "ADDRESS")
    port: int = setting(8000, "Port to listen on; 0 picks a free one and prints it.", "http", "PORT", ge=0, le=65535)
    read_timeout: float = setting(
        30.0,
        "Time allowed for the TLS handshake, for the headers, and between parts of the body; after it the connection "
        "is closed.",
        "http",
        "SECONDS",
        gt=0,
    )

    data_parallel_size: int = setting(
        1,
        "Engine processes behind this server, each with its own copy of the model and its own KV cache. A prompt goes "
        "where most of it is cached, unless that engine is busier by more than this saves. With GPUs each engine has "
        "one, on a CPU a part of the cores. Other limits, such as --max-num-seqs and --kv-cache-memory, hold for each "
        "engine.",
        "parallel",
        "N",
        ge=1,
        le=256,
    )

    access_log: bool = setting(
        True,
        "Log one line per request. Health probes and metrics scrapes get a line only when their answer changes.",
        "log",
    )
    log_prompts: bool = setting(False, "Add prompts to the access log. They are never logged otherwise.", "log")
    tracing: bool = setting(
        False,
        "Send a trace of each request to OTEL_EXPORTER_OTLP_ENDPOINT; requires pip install "
        "'persimmon-server[tracing]'.",
        "log",
    )

    additional_properties: bool = setting(
        False,
        "Allow other properties in objects whose JSON schema lists properties but has no additionalProperties. Off, as "
        "in vLLM: models that may add properties seldom stop.",
        "engine",
    )

    limit_mm_per_prompt: MediaLimits | None = setting(
        None,
        'Maximum number of images in a request, in vLLM\'s JSON: {"image": 4}. Default: as many as the context holds.',
        "engine",
        "JSON",
    )

    max_num_queued_reqs: int | None = setting(
        None,
        "Maximum sequences in the server, running ones included; each of a request's n counts. Beyond it requests get "
        "a 429. Default: five times --max-num-seqs for each engine, so that the last one waits for about four answers.",
        "load",
        "N",
        ge=1,
    )
    max_num_queued_tokens: int | None = setting(
        None,
        "Maximum prompt tokens that wait to be computed. Beyond it requests get a 429. Default: 256 times "
        "--max-num-batched-tokens for each engine, which is 256 full steps.",
        "load",
        "TOKENS",
        ge=1,
    )
    step_timeout: float | None = setting(
        None,
        "An engine that has work but finishes no step in this time counts as hung: /health fails, and the engine is "
        "killed and restarted. Default: 30 with a GPU, where the longest step takes a fraction of a second; 300 on a "
        "CPU, where a step of a large model can take minutes.",
        "load",
        "SECONDS",
        gt=0,
    )
    worker_timeout: float = setting(
        30.0,
        "An API worker whose event loop is blocked for this long counts as hung; it is killed and restarted.",
        "load",
        "SECONDS",
        ge=2,
    )
    drain_timeout: float = setting(
        25.0,
        "Time that open requests have to finish after SIGTERM; then they end with an error. Keep it a few seconds "
        "below the time the process has to stop, which is 30 in Kubernetes.",
        "load",
        "SECONDS",
        ge=0,
    )
    send_timeout: float = setting(
        60.0,
        "A client that leaves 64 KiB of its answer unread for this long is disconnected.",
        "load",
        "SECONDS",
        gt=0,
    )
    sse_ping_interval: float = setting(
        15.0,
        "Interval of the comments that keep a silent stream open through proxies; 0 for none. The first one sends the "
        "status 200, so a later error comes as an event.",
        "load",
        "SECONDS",
        ge=0,
    )

    @field_validator("limit_mm_per_prompt", mode="before")
    @classmethod
    def _media(cls, value: Any) -> Any:
        return MediaLimits.from_json(value) if isinstance(value, str) else value
