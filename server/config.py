"""All settings of the server together: their flags, their environment variables, and how they are read and checked.

The sections in settings/ define each setting once; flags, variables and docs/reference/settings.md come from them.
A flag wins over its environment variable, which wins over the default.
"""

import argparse
from collections.abc import Collection, Iterator
from typing import Any

from pydantic import ByteSize, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from persimmon.server.settings import ENVIRONMENT_PREFIX
from persimmon.server.settings.engine import EngineSettings
from persimmon.server.settings.http import HttpSettings
from persimmon.server.settings.model import ModelSettings
from persimmon.server.settings.section import SettingsError
from persimmon.server.settings.security import SecuritySettings

_RULES = {
    "bool_parsing": "expected true or false",
    "byte_size": "expected a size, for example 4GiB or 800MB",
    "byte_size_unit": "expected a size, for example 4GiB or 800MB",
    "float_parsing": "expected a number",
    "int_parsing": "expected an integer",
}
"""What a setting's value has to be, where pydantic's own words would not help: its error types -> ours."""


class Settings(EngineSettings, SecuritySettings, HttpSettings, ModelSettings, BaseSettings):
    """The settings of `persimmon serve`."""

    # Lists come as text with commas, not as JSON.
    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, enable_decoding=False, frozen=True, protected_namespaces=()
    )

    def of_engine(self) -> EngineSettings:
        """Those of the engine process: no keys, and no paths of their files."""
        return EngineSettings.model_validate({name: getattr(self, name) for name in EngineSettings.model_fields})


GROUPS = {
    "model": "model",
    "http": "HTTP",
    "access": "API keys",
    "log": "logs and traces",
    "parallel": "several engines",
    "engine": "scheduling and answers",
    "gpu": "GPU",
    "load": "overload, health, shutdown",
    "memory": "KV cache",
    "debug": "profiling",
}

EMBEDDED_GROUPS = ("model", "engine", "gpu", "memory", "debug")
"""The groups of a server that does not listen: `persimmon generate`, and `persimmon.EmbeddedServer`."""


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


def listed(keys: Collection[str] = tuple(GROUPS)) -> Iterator[tuple[str, FieldInfo]]:
    """The settings of some groups, in the order in which people read them."""
    for key in GROUPS:
        if key in keys:
            yield from ((name, field) for name, field in Settings.model_fields.items() if group(field) == key)


def add_arguments(parser: argparse.ArgumentParser, keys: Collection[str] = tuple(GROUPS)) -> None:
    """Adds a flag for every setting of some groups.

    Args:
        parser: gets them.
        keys: of GROUPS.
    """
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items() if key in keys}
    for name, field in listed(keys):
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
        message = first["msg"].removeprefix("Value error, ")
        rule = _RULES.get(first["type"]) or message[0].lower() + message[1:]
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
    if settings.embedding_table == "file" and settings.load_format == "dummy":
        raise SettingsError("--embedding-table is file, but --load-format dummy reads no file: leave one of them out")
    sizes = None if settings.enforce_eager else settings.cuda_graph_sizes
    if sizes is not None and not (sizes and all(1 <= size <= settings.max_num_seqs for size in sizes)):
        raise SettingsError(
            f"--cuda-graph-sizes is {','.join(map(str, sizes)) or 'empty'}: give batch sizes from 1 to --max-num-seqs, "
            f"which is {settings.max_num_seqs}; raise that for larger ones, or give --enforce-eager for none"
        )
    return settings
