"""Keys, certificates, and the clients, web pages and proxies that are trusted.  No part of it reaches the engine."""

import ipaddress
import re
from pathlib import Path
from typing import Any

from pydantic import SecretStr, field_validator

from persimmon.server.settings.section import Section, setting

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")


class SecuritySettings(Section):
    """Settings of who may use the server, and for what."""

    ssl_certfile: Path | None = setting(
        None,
        "Certificate chain (PEM) for HTTPS; requires --ssl-keyfile. SIGHUP reloads both.",
        "http",
        "FILE",
    )
    ssl_keyfile: Path | None = setting(None, "Private key of the certificate (PEM), not encrypted.", "http", "FILE")
    allowed_origins: tuple[str, ...] | None = setting(
        None,
        "Origins whose web pages may use the server (CORS), for example https://chat.example.com; * for all. Other "
        "pages get a 403. Default: only pages of the server itself.",
        "http",
        "ORIGIN",
        several=True,
    )
    allowed_media_domains: tuple[str, ...] | None = setting(
        None,
        "Hosts from which images are fetched, for example images.example.com; each name stands only for itself, not "
        "for its subdomains. Private addresses are refused whatever their name. Default: none; images come in data: "
        "URLs.",
        "http",
        "HOST",
        several=True,
    )
    forwarded_allow_ips: str = setting(
        "127.0.0.1",
        "Proxies whose X-Forwarded-For and X-Forwarded-Proto headers are trusted: comma-separated addresses or "
        "networks; * for all.",
        "http",
        "ADDRESSES",
    )

    api_key: tuple[SecretStr, ...] | None = setting(
        None,
        "Accepted API keys. Requests send one as Authorization: Bearer KEY or X-Api-Key: KEY. Other users of the "
        "machine can read a command line, so the environment variable (comma-separated) or --api-key-file is safer. "
        "Default: no key is required.",
        "access",
        "KEY",
        several=True,
    )
    api_key_file: Path | None = setting(
        None,
        "File of API keys, one per line: name:key, optionally followed by max-priority=N and share=N. Logs show the "
        "name. SIGHUP reloads the file.",
        "access",
        "FILE",
    )
    max_priority: int = setting(
        0,
        "How urgent a request may be: the lowest allowed `priority` is minus this number. Lower priorities go first; "
        "numbers above 0 are always allowed. A line of --api-key-file can set another limit for its key.",
        "access",
        "N",
        ge=0,
        le=2**31,
    )
    protect_metrics: bool = setting(False, "Require a key for /metrics too.", "access")
    max_concurrent_requests_per_key: int | None = setting(
        None, "Maximum concurrent requests per key; more get a 429. Default: no limit.", "access", "N", ge=1
    )
    requests_per_minute_per_key: int | None = setting(
        None,
        "Maximum requests per key and minute, at once or spread out; more get a 429. Default: no limit.",
        "access",
        "N",
        ge=1,
    )

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

    @field_validator("allowed_media_domains")
    @classmethod
    def _hosts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        hosts = tuple(host.lower() for host in value or ())
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is not a host name; give names like images.example.com")
        return hosts or None

    @field_validator("api_key", "allowed_origins", "allowed_media_domains", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        # A flag may come several times, each with several values; a variable has commas between them.
        parts = [value] if isinstance(value, str) else value
        return [part.strip() for text in parts for part in text.split(",")] if isinstance(parts, list) else value
