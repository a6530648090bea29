"""Every setting of the server, once: its name, type, default and help.

Flags, environment variables and the README's table are made from `Settings`; nothing else names a setting.
A flag wins over its environment variable, which wins over the default.
"""

import argparse
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENVIRONMENT_PREFIX = "PERSIMMON_"


class SettingsError(ValueError):
    """A setting has a value it cannot have.  The message is one line for the person who gave it."""


def _setting(default: Any, help: str, group: str, metavar: str | None = None, **constraints: Any) -> Any:
    extra: dict[str, Any] = {"group": group} | ({"metavar": metavar} if metavar else {})
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
        "Type of the network's numbers and of the KV cache. auto: the checkpoint's own 16-bit type on a GPU; on a CPU "
        "bfloat16 for a checkpoint stored in it, if the processor multiplies that, and otherwise float32, the exact "
        "choice, in which 16-bit weights stay as they are.",
        "model",
    )
    add_bos: Literal["auto", "true", "false"] = _setting(
        "auto",
        "Whether text prompts start with the beginning-of-sequence token. "
        "auto does what the checkpoint's tokenizer_config.json says.",
        "model",
    )
    seed: int = _setting(
        0,
        "Seed of dummy weights, and of requests that bring no seed of their own.",
        "model",
        "N",
        ge=0,
        lt=2**63,
    )

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 is every interface.", "http", "ADDRESS")
    port: int = _setting(8000, "Port to listen on; 0 picks a free one and prints it.", "http", "PORT", ge=0, le=65535)
    api_workers: int = _setting(
        1,
        "Processes that answer HTTP. One streams tens of thousands of tokens a second from one core.",
        "http",
        "N",
        ge=1,
        le=256,
    )

    max_model_len: int | None = _setting(
        None,
        "Most tokens of one sequence, prompt and answer together. Default: what the model was trained for, "
        "or what the KV cache holds if that is less.",
        "engine",
        "TOKENS",
        ge=2,
    )
    max_num_seqs: int = _setting(256, "Most sequences that run at once; more wait.", "engine", "N", ge=1, le=65536)
    max_num_batched_tokens: int = _setting(
        2048,
        "Token budget of one step: one for each decoding sequence, the rest for prompt chunks. "
        "At least --max-num-seqs.",
        "engine",
        "TOKENS",
        ge=1,
    )
    max_itl_ms: float | None = _setting(
        None,
        "Longest that a step with decoding sequences may take for prompts beside them; while more sequences wait for "
        "their first token than decode, longer by that ratio. Default: 1.75 times what it takes without prompts.",
        "engine",
        "MILLISECONDS",
        gt=0,
    )
    async_scheduling: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Plan and launch each step while the one before it runs. auto: on with a GPU; off on a CPU, where every token "
        "would come a step late.",
        "engine",
    )
    enable_prefix_caching: bool = _setting(
        True, "Reuse the KV blocks of a prompt's beginning when it was seen before.", "engine"
    )

    cuda_graph_sizes: Annotated[tuple[int, ...] | None, NoDecode] = _setting(
        None,
        "Batch sizes that decode steps are captured for as CUDA graphs at start, like 1,2,4,8; a step runs in the next "
        "larger one, and without a graph beyond the largest. None above --max-num-seqs. Default: dense up to "
        "--max-num-seqs. Without a GPU there are none.",
        "gpu",
        "N,N,...",
    )
    enforce_eager: bool = _setting(
        False, "Capture no CUDA graphs: starts sooner and takes less memory, but decodes slower.", "gpu"
    )

    block_size: Literal[16, 32, 64] = _setting(32, "Tokens in one block of the KV cache.", "memory")
    kv_cache_memory: ByteSize | None = _setting(
        None,
        "Size of the KV cache, like 4GiB or 800MB. Default: what --gpu-memory-utilization leaves on a GPU; "
        "on a CPU, room for --max-num-seqs full sequences but at most a quarter of the free memory.",
        "memory",
        "SIZE",
        gt=0,
    )
    gpu_memory_utilization: float = _setting(
        0.9,
        "Share of the GPU's memory to plan with (weights, activations, CUDA graphs, KV cache).",
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

    @property
    def add_bos_token(self) -> bool | None:
        """`add_bos` as the tokenizer takes it: None follows the checkpoint."""
        return {"auto": None, "true": True, "false": False}[self.add_bos]


GROUPS = {
    "model": "what is served",
    "http": "where it listens",
    "engine": "how requests share the machine",
    "gpu": "CUDA graphs",
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
        return _checked(Settings(**given))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        rule = first["msg"][0].lower() + first["msg"][1:]
        raise SettingsError(f"{flag(name)} (or {environment_variable(name)}) is {first['input']}: {rule}") from None


def _checked(settings: Settings) -> Settings:
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise SettingsError(
            f"--max-num-batched-tokens is {settings.max_num_batched_tokens} but --max-num-seqs is "
            f"{settings.max_num_seqs}: each running sequence needs one token a step, "
            "so raise the first or lower the second"
        )
    sizes = settings.cuda_graph_sizes
    if sizes is not None and not (sizes and all(1 <= size <= settings.max_num_seqs for size in sizes)):
        raise SettingsError(
            f"--cuda-graph-sizes is {','.join(map(str, sizes)) or 'empty'}: give batch sizes from 1 to --max-num-seqs, "
            f"which is {settings.max_num_seqs}, or --enforce-eager for none"
        )
    return settings


def settings_table() -> str:
    """Every setting as a Markdown table, for the README."""
    lines = ["| Flag | Environment | Default | |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        shown = f"`{flag(name)}`"
        if field.annotation is bool:
            shown += f", `{flag('no_' + name)}`"
        allowed = choices(field)
        values = f" One of {', '.join(f'`{value}`' for value in allowed)}." if allowed else ""
        default = default_text(field)
        shown_default = f"`{default}`" if default is not None else "see text"
        lines.append(f"| {shown} | `{environment_variable(name)}` | {shown_default} | {field.description}{values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_table())
