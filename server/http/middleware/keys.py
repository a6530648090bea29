"""API keys: where they come from, and whose key a request brings.

Only a key's digest is kept, so nothing here can put a key into a log, an error or a traceback.
"""

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from http import HTTPStatus
from pathlib import Path

from persimmon.server.config import Settings
from persimmon.server.http.errors import ApiError
from persimmon.server.settings.section import SettingsError

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]+")
_OPTION = re.compile(r"(max-priority|share)=([0-9]{1,9})")
_BEARER = "bearer "

MAX_SHARE = 1000
"""The largest share of a key; the smallest is 1."""

_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that is let in.

    Attributes:
        name: what it is called in logs, which may be read by more people than the key.
        digest: SHA-256 of the key.
        max_priority: how urgent its requests may be; None for the server-wide limit.
        share: of the engine while others want it too, relative to other keys'.
    """

    name: str
    digest: bytes
    max_priority: int | None = None
    share: int = 1

    @classmethod
    def of(cls, name: str, key: str, max_priority: int | None = None, share: int = 1) -> "ApiKey":
        """A key as its owner writes it."""
        return cls(name=name, digest=sha256(key.encode()).digest(), max_priority=max_priority, share=share)

    @property
    def cache_salt(self) -> bytes:
        """Separates this key's cached prompts from those of others; does not reveal the key."""
        return blake2b(self.digest, digest_size=_SALT_BYTES, person=b"prefix cache").digest()


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All accepted keys; without any, every request is accepted."""

    keys: Sequence[ApiKey] = ()

    @property
    def digests(self) -> Sequence[bytes]:
        """The digest of each key."""
        return [key.digest for key in self.keys]

    def owner(self, authorization: str | None, bare: str | None = None) -> ApiKey | None:
        """The key that a request brings; None where the server asks for none.

        It takes as long for a wrong key as for a right one, and for the first as for the last.

        Args:
            authorization: the header of this name.
            bare: the header that holds nothing but a key, which counts where the other one holds none.

        Raises:
            ApiError: a 401: the key is missing, or not one of these.
        """
        if not self.keys:
            return None
        if authorization is not None and authorization.lower().startswith(_BEARER):
            bare = authorization[len(_BEARER) :]
        if bare is None:
            raise _unauthorized(
                "You did not provide an API key. Send it in the header Authorization: Bearer KEY, or X-Api-Key: KEY."
            )
        given = sha256(bare.strip().encode()).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, given):
                found = key
        if found is None:
            raise _unauthorized("The API key is not valid for this server.")
        return found


def key_ring(settings: Settings) -> KeyRing:
    """The keys of --api-key and --api-key-file.

    Raises:
        SettingsError: the file cannot be read, a line is not a name with a key, or a key or a name occurs twice.
    """
    keys = [
        _checked(ApiKey.of(f"key-{number}", secret.get_secret_value()), secret.get_secret_value(), "--api-key")
        for number, secret in enumerate(settings.api_key or (), 1)
    ]
    if settings.api_key_file is not None:
        keys += _read(settings.api_key_file)
    for what, own in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(own)) < len(own):
            raise SettingsError(
                f"--api-key and --api-key-file have the same {what} twice; each must belong to one client"
            )
    return KeyRing(tuple(keys))


def salted(own: bytes, asked: str | None) -> bytes:
    """The salt of a request: its key's, and the one that it asks for itself.

    Args:
        own: of the key; empty without one.
        asked: the request's `cache_salt`.
    """
    if asked is None:
        return own
    return blake2b(asked.encode(), digest_size=_SALT_BYTES, key=own).digest()


def _read(path: Path) -> list[ApiKey]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise SettingsError(f"--api-key-file {path} cannot be read: {reason}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"--api-key-file {path}, line {number}"
        name, separator, rest = (part.strip() for part in line.partition(":"))
        if not separator or not _NAME.fullmatch(name):
            raise SettingsError(f"{where}: expected name:key, with a name of up to 64 letters, digits and ._@-")
        key, *options = rest.split() or [""]
        max_priority, share = _options(options, where)
        keys.append(_checked(ApiKey.of(name, key, max_priority, share), key, where))
    if not keys:
        raise SettingsError(f"--api-key-file {path} has no key; write lines like alice:a-long-random-text")
    return keys


def _options(texts: Sequence[str], where: str) -> tuple[int | None, int]:
    """The max_priority and share that stand behind a key."""
    options: dict[str, int] = {}
    for text in texts:
        option = _OPTION.fullmatch(text)
        if option is None or option[1] in options or (option[1] == "share" and not 1 <= int(option[2]) <= MAX_SHARE):
            # What it is does not appear in the message: it may be a part of a key.
            raise SettingsError(
                f"{where}: a key must be printable ASCII without spaces; only max-priority=N and share=N (from 1 to "
                f"{MAX_SHARE}) may follow it, each once"
            )
        options[option[1]] = int(option[2])
    return options.get("max-priority"), options.get("share", 1)


def _checked(key: ApiKey, text: str, where: str) -> ApiKey:
    if not _KEY.fullmatch(text):
        raise SettingsError(f"{where}: a key must be printable ASCII without spaces, and not empty")
    return key


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        message,
        code="invalid_api_key",
        headers={"WWW-Authenticate": 'Bearer realm="persimmon"'},
    )
