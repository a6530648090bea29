"""Every setting of the server, once: its name, type, default and help.

Flags, environment variables and docs/reference/settings.md are made from `Settings`; nothing else names a setting.
A flag wins over its environment variable, which wins over the default.
"""

import argparse
import ipaddress
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENVIRONMENT_PREFIX = "PERSIMMON_"

_RULES = {
    "bool_parsing": "expected true or false",
    "byte_size": "expected a size, for example 4GiB or 800MB",
    "byte_size_unit": "expected a size, for example 4GiB or 800MB",
    "float_parsing": "expected a number",
    "int_parsing": "expected a whole number",
}
"""What a setting's value has to be, where pydantic's own words would not help: its error types -> ours."""

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")

MAX_BODY_BYTES = 32 * 2**20
"""Default limit of a request's body: a text of 16,384 tokens is some 100 KB, and a request may hold many texts."""


class SettingsError(ValueError):
    """A setting has an invalid value.  The message is one line for the person who set it."""


def _setting(
    default: Any, help: str, group: str, metavar: str | None = None, *, several: bool = False, **constraints: Any
) -> Any:
    extra: dict[str, Any] = {"group": group, "several": several} | ({"metavar": metavar} if metavar else {})
    return Field(default, description=help, json_schema_extra=extra, **constraints)


class Settings(BaseSettings):
    """The settings of `persimmon serve`."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, frozen=True, protected_namespaces=())

    model: str | None = _setting(
        None,
        "Checkpoint to serve: a folder in Hugging Face layout, or a Hugging Face Hub id. "
        "Without it, the small demo checkpoint that comes with the server.",
        "model",
        "PATH_OR_HUB_ID",
    )
    served_model_name: str | None = _setting(
        None, "Name of the model in the API. Default: the last part of --model.", "model", "NAME"
    )
    load_format: Literal["auto", "dummy"] = _setting(
        "auto", "auto reads the checkpoint's weights; dummy makes random ones, to measure speed.", "model"
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = _setting(
        "auto",
        "Type of activations and of the KV cache. auto on a GPU: the checkpoint's own 16-bit type. auto on a CPU: "
        "bfloat16 for a bfloat16 checkpoint if the processor has instructions for it; otherwise float32, which is "
        "exact, and in which 16-bit weights stay 16 bits.",
        "model",
    )
    add_bos: Literal["auto", "true", "false"] = _setting(
        "auto",
        "Whether text prompts and conversations start with the beginning-of-sequence token. "
        "auto follows the checkpoint's files.",
        "model",
    )
    seed: int = _setting(
        0,
        "Seed of dummy weights and of requests without a seed.",
        "model",
        "N",
        ge=0,
        lt=2**63,
    )

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces.", "http", "ADDRESS")
    port: int = _setting(8000, "Port to listen on; 0 picks a free one and prints it.", "http", "PORT", ge=0, le=65535)
    api_workers: int = _setting(
        1,
        "Processes that answer HTTP. One streams tens of thousands of tokens a second from one core.",
        "http",
        "N",
        ge=1,
        le=256,
    )
    ssl_certfile: Path | None = _setting(
        None,
        "Certificate chain (PEM) for HTTPS; requires --ssl-keyfile. SIGHUP reloads both.",
        "http",
        "FILE",
    )
    ssl_keyfile: Path | None = _setting(None, "Private key of the certificate (PEM), not encrypted.", "http", "FILE")
    read_timeout: float = _setting(
        30.0,
        "Time allowed for the TLS handshake, for the headers, and between parts of the body; after it the connection "
        "is closed.",
        "http",
        "SECONDS",
        gt=0,
    )
    max_body_size: ByteSize = _setting(
        ByteSize(MAX_BODY_BYTES),
        "Maximum size of a request body, after decompression; larger ones get a 413. All bodies that an API worker is "
        "receiving may take four times this; beyond that requests get a 429.",
        "http",
        "SIZE",
        gt=0,
    )
    allowed_origins: Annotated[tuple[str, ...] | None, NoDecode] = _setting(
        None,
        "Origins whose web pages may use the server (CORS), for example https://chat.example.com; * for all. Other "
        "pages get a 403. Default: only pages of the server itself.",
        "http",
        "ORIGIN",
        several=True,
    )
    forwarded_allow_ips: str = _setting(
        "127.0.0.1",
        "Proxies whose X-Forwarded-For and X-Forwarded-Proto headers are trusted: comma-separated addresses or "
        "networks; * for all.",
        "http",
        "ADDRESSES",
    )

    api_key: Annotated[tuple[SecretStr, ...] | None, NoDecode] = _setting(
        None,
        "Accepted API keys. Requests send one as Authorization: Bearer KEY or X-Api-Key: KEY. Other users of the "
        "machine can read a command line, so the environment variable (comma-separated) or --api-key-file is safer. "
        "Default: no key is required.",
        "access",
        "KEY",
        several=True,
    )
    api_key_file: Path | None = _setting(
        None,
        "File of API keys, one per line: name:key, optionally followed by max-priority=N and share=N. Logs show the "
        "name. SIGHUP reloads the file.",
        "access",
        "FILE",
    )
    max_priority: int = _setting(
        0,
        "How urgent a request may be: the lowest allowed `priority` is minus this number. Lower priorities go first; "
        "numbers above 0 are always allowed. A line of --api-key-file can set another limit for its key.",
        "access",
        "N",
        ge=0,
        le=2**31,
    )
    protect_metrics: bool = _setting(False, "Require a key for /metrics too.", "access")
    max_concurrent_requests_per_key: int | None = _setting(
        None, "Maximum concurrent requests per key; more get a 429. Default: no limit.", "access", "N", ge=1
    )
    requests_per_minute_per_key: int | None = _setting(
        None,
        "Maximum requests per key and minute, at once or spread out; more get a 429. Default: no limit.",
        "access",
        "N",
        ge=1,
    )

    log_format: Literal["text", "json"] = _setting(
        "text", "Log format of all processes: plain text, or one JSON object per line.", "log"
    )
    access_log: bool = _setting(
        True,
        "Log one line per request. Health probes and metrics scrapes get a line only when their answer changes.",
        "log",
    )
    log_prompts: bool = _setting(False, "Add prompts to the access log. They are never logged otherwise.", "log")
    tracing: bool = _setting(
        False,
        "Send a trace of each request to OTEL_EXPORTER_OTLP_ENDPOINT; requires pip install "
        "'persimmon-server[tracing]'.",
        "log",
    )

    max_model_len: int | None = _setting(
        None,
        "Maximum length of a sequence, prompt and answer together. Default: the model's context length (times the "
        "factor of its RoPE scaling), or what the KV cache holds if that is less.",
        "engine",
        "TOKENS",
        ge=2,
    )
    max_num_seqs: int = _setting(
        256,
        "Maximum sequences that run at once; more wait. Unless set, it is lowered to --max-num-batched-tokens.",
        "engine",
        "N",
        ge=1,
        le=65536,
    )
    max_num_batched_tokens: int = _setting(
        2048,
        "Token budget of one step: one for each decoding sequence, the rest for prompt chunks. "
        "At least --max-num-seqs; unless set, it is raised to that.",
        "engine",
        "TOKENS",
        ge=1,
    )
    max_itl_ms: float | None = _setting(
        None,
        "Limit on the time of a step that runs prompt chunks next to decoding sequences. When more sequences wait for "
        "their first token than decode, it grows by that ratio. Default: 1.75 times the time without prompts.",
        "engine",
        "MILLISECONDS",
        gt=0,
    )
    async_scheduling: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Plan and launch each step while the one before it runs. auto: on with a GPU; off on a CPU, where every token "
        "would come one step late.",
        "engine",
    )
    additional_properties: bool = _setting(
        False,
        "Allow other properties in objects whose JSON schema lists properties but has no additionalProperties. Off, as "
        "in vLLM: models that may add properties seldom stop.",
        "engine",
    )
    enable_prefix_caching: bool = _setting(
        True, "Reuse the KV blocks of prompt prefixes that were seen before.", "engine"
    )

    cuda_graph_sizes: Annotated[tuple[int, ...] | None, NoDecode] = _setting(
        None,
        "Batch sizes for which decode steps are captured as CUDA graphs at start, for example 1,2,4,8. A step uses the "
        "next larger size; larger steps run without a graph. At most --max-num-seqs. Default: dense up to "
        "--max-num-seqs. Ignored without a GPU.",
        "gpu",
        "N,N,...",
    )
    enforce_eager: bool = _setting(
        False, "Do not capture CUDA graphs: faster start and less memory, but slower decoding.", "gpu"
    )

    max_num_queued_reqs: int | None = _setting(
        None,
        "Maximum sequences in the server, running ones included; each of a request's n counts. Beyond it requests get "
        "a 429. Default: five times --max-num-seqs, so that the last one waits for about four answers.",
        "load",
        "N",
        ge=1,
    )
    max_num_queued_tokens: int | None = _setting(
        None,
        "Maximum prompt tokens that wait to be computed. Beyond it requests get a 429. Default: 256 times "
        "--max-num-batched-tokens, which is 256 full steps.",
        "load",
        "TOKENS",
        ge=1,
    )
    queue_timeout: float = _setting(
        60.0,
        "Maximum time in the queue; then the request gets a 429. 0 for no limit. Most proxies and clients close a "
        "silent connection after a minute.",
        "load",
        "SECONDS",
        ge=0,
    )
    step_timeout: float | None = _setting(
        None,
        "An engine that has work but finishes no step in this time counts as hung: /health fails, and the engine is "
        "killed and restarted. Default: 30 with a GPU, where the longest step takes a fraction of a second; 300 on a "
        "CPU, where a step of a large model can take minutes.",
        "load",
        "SECONDS",
        gt=0,
    )
    worker_timeout: float = _setting(
        30.0,
        "An API worker whose event loop is blocked for this long counts as hung; it is killed and restarted.",
        "load",
        "SECONDS",
        ge=2,
    )
    drain_timeout: float = _setting(
        25.0,
        "Time that open requests have to finish after SIGTERM; then they end with an error. Keep it a few seconds "
        "below the time the process has to stop, which is 30 in Kubernetes.",
        "load",
        "SECONDS",
        ge=0,
    )
    send_timeout: float = _setting(
        60.0,
        "A client that leaves 64 KiB of its answer unread for this long is disconnected.",
        "load",
        "SECONDS",
        gt=0,
    )
    sse_ping_interval: float = _setting(
        15.0,
        "Interval of the comments that keep a silent stream open through proxies; 0 for none. The first one sends the "
        "status 200, so a later error comes as an event.",
        "load",
        "SECONDS",
        ge=0,
    )

    block_size: Literal[16, 32, 64] = _setting(32, "Tokens in one block of the KV cache.", "memory")
    kv_cache_memory: ByteSize | None = _setting(
        None,
        "Size of the KV cache, for example 4GiB or 800MB, allocated at start. Default on a GPU: what "
        "--gpu-memory-utilization leaves. Default on a CPU: room for --max-num-seqs full sequences, but at most a "
        "quarter of the free memory, and at most 1 GiB or four times the weights, whichever is more; never less than "
        "one sequence of the given --max-model-len.",
        "memory",
        "SIZE",
        gt=0,
    )
    gpu_memory_utilization: float = _setting(
        0.9,
        "Share of the GPU's memory to use for weights, activations, CUDA graphs and the KV cache.",
        "memory",
        "SHARE",
        gt=0,
        le=1,
    )

    @field_validator("block_size", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        # Flags and variables are text, and the allowed values are numbers.
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("cuda_graph_sizes", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _addresses(cls, value: str) -> str:
        for part in value.split(",") if value.strip() not in ("", "*") else ():
            try:
                ipaddress.ip_network(part.strip())
            except ValueError as error:
                raise ValueError(f"{error}; give addresses or networks like 10.0.0.0/8, or *") from None
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for origin in value or ():
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin; give scheme, host and port, like https://chat.example.com"
                )
        return value

    @field_validator("api_key", "allowed_origins", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        # A flag may come several times, each with several values; a variable has commas between them.
        parts = [value] if isinstance(value, str) else value
        return [part.strip() for text in parts for part in text.split(",")] if isinstance(parts, list) else value

    @property
    def add_bos_token(self) -> bool | None:
        """`add_bos` as the tokenizer takes it: None follows the checkpoint."""
        return {"auto": None, "true": True, "false": False}[self.add_bos]


GROUPS = {
    "model": "model",
    "http": "HTTP",
    "access": "API keys",
    "log": "logs and traces",
    "engine": "scheduling and answers",
    "gpu": "CUDA graphs",
    "load": "overload, health, shutdown",
    "memory": "KV cache",
}


def flag(name: str) -> str:
    """The command-line spelling of a setting: max_model_len -> --max-model-len."""
    return "--" + name.replace("_", "-")


def environment_variable(name: str) -> str:
    """The environment variable of a setting: port -> PERSIMMON_PORT."""
    return ENVIRONMENT_PREFIX + name.upper()


def choices(field: FieldInfo) -> tuple[Any, ...] | None:
    """The allowed values of a setting that has a fixed few, else None."""
    return getattr(field.annotation, "__args__", None) if "Literal" in repr(field.annotation) else None


def default_text(field: FieldInfo) -> str | None:
    """A setting's default as a person would type it; None where the help text explains it."""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, ByteSize):
        return field.default.human_readable().replace(".0", "")
    return None if field.default is None else str(field.default)


def group(field: FieldInfo) -> str:
    """The key in GROUPS that a setting is listed under."""
    extra = field.json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else ""


def add_arguments(parser: argparse.ArgumentParser, keys: Collection[str] = tuple(GROUPS)) -> None:
    """Adds a flag for every setting of some groups.

    Args:
        parser: gets them.
        keys: of GROUPS.
    """
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items() if key in keys}
    for name, field in Settings.model_fields.items():
        if group(field) not in groups:
            continue
        default = default_text(field)
        notes = [f"default: {default}"] if default is not None else []
        notes.append(f"env: {environment_variable(name)}")
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,  # what was not given is left to the environment and the default
            "help": f"{field.description} [{', '.join(notes)}]".replace("%", "%%"),
        }
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            allowed = choices(field)
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            if extra["several"]:
                options |= {"action": "extend", "nargs": "+"}
            options["metavar"] = "{" + ",".join(map(str, allowed)) + "}" if allowed else extra.get("metavar")
        groups[group(field)].add_argument(flag(name), **options)


def read_settings(given: dict[str, Any]) -> Settings:
    """Settings from flags, then the environment, then defaults.

    Args:
        given: the flags that were on the command line, by setting name, as text.

    Raises:
        SettingsError: naming the flag, the value and what is allowed.
    """
    try:
        return _checked(_with_defaults_that_follow(Settings(**given)))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        rule = _RULES.get(first["type"]) or first["msg"][0].lower() + first["msg"][1:]
        secret = "SecretStr" in repr(Settings.model_fields[name].annotation)
        given_value = "not shown" if secret else first["input"]
        raise SettingsError(f"{flag(name)} (or {environment_variable(name)}) is {given_value}: {rule}") from None


def _with_defaults_that_follow(settings: Settings) -> Settings:
    """Where one of two settings limits the other and only one was given, the other one is made to fit it."""
    given = settings.model_fields_set
    budget, sequences = settings.max_num_batched_tokens, settings.max_num_seqs
    if budget >= sequences:
        return settings
    if "max_num_seqs" not in given:
        return settings.model_copy(update={"max_num_seqs": budget})
    if "max_num_batched_tokens" not in given:
        return settings.model_copy(update={"max_num_batched_tokens": sequences})
    return settings


def _checked(settings: Settings) -> Settings:
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise SettingsError(
            f"--max-num-batched-tokens is {settings.max_num_batched_tokens} but --max-num-seqs is "
            f"{settings.max_num_seqs}: each running sequence needs one token a step, "
            "so raise the first or lower the second"
        )
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise SettingsError("--ssl-certfile and --ssl-keyfile are given together or not at all")
    for name in ("max_concurrent_requests_per_key", "requests_per_minute_per_key", "protect_metrics"):
        if getattr(settings, name) and settings.api_key is None and settings.api_key_file is None:
            raise SettingsError(f"{flag(name)} needs keys: give --api-key-file or --api-key")
    sizes = settings.cuda_graph_sizes
    if sizes is not None and not (sizes and all(1 <= size <= settings.max_num_seqs for size in sizes)):
        raise SettingsError(
            f"--cuda-graph-sizes is {','.join(map(str, sizes)) or 'empty'}: give batch sizes from 1 to --max-num-seqs, "
            f"which is {settings.max_num_seqs}; raise that for larger ones, or give --enforce-eager for none"
        )
    return settings


def settings_table() -> str:
    """Every setting as a Markdown table, for docs/reference/settings.md."""
    lines = ["| Flag | Environment | Default | |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        shown = f"`{flag(name)} {extra['metavar']}`" if "metavar" in extra else f"`{flag(name)}`"
        if field.annotation is bool:
            shown += f", `{flag('no_' + name)}`"
        allowed = choices(field)
        values = f" One of {', '.join(f'`{value}`' for value in allowed)}." if allowed else ""
        default = default_text(field)
        shown_default = f"`{default}`" if default is not None else "see text"
        lines.append(f"| {shown} | `{environment_variable(name)}` | {shown_default} | {field.description}{values} |")
    return "\n".join(lines)
