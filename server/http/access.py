"""Who may ask what of the HTTP server, as the settings say; and whether what they name can be used at all.

Knows settings and files; what is done with them is others' affair.
"""

import ssl
from dataclasses import dataclass, field
from hashlib import blake2b

from server.config import MAX_BODY_BYTES, Settings, SettingsError
from server.http.key_limits import KeyLimiter, KeyLimits
from server.http.keys import KeyRing, key_ring
from server.http.siblings import WorkerPlace
from server.tracing import check_installed


@dataclass(frozen=True, slots=True)
class Access:
    """What every API worker asks of clients.

    Attributes:
        keys: one of these, where there are any.
        limits: of each key.
        metrics_need_key: whether metrics are told to those with a key alone.
        allowed_origins: of web pages that may ask from a browser.
        max_body_bytes: of a request.
        read_timeout: seconds that a client may take to send its headers, and pause in its body.
        log_prompts: whether the access log tells what was asked.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    limits: KeyLimits = field(default_factory=KeyLimits)
    metrics_need_key: bool = False
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    read_timeout: float = 30.0
    log_prompts: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "Access":
        """What the settings say.

        Raises:
            SettingsError: the keys cannot be read.
        """
        return cls(
            keys=key_ring(settings),
            limits=KeyLimits(settings.max_concurrent_requests_per_key, settings.requests_per_minute_per_key),
            metrics_need_key=settings.protect_metrics,
            allowed_origins=settings.allowed_origins or (),
            max_body_bytes=settings.max_body_size,
            read_timeout=settings.read_timeout,
            log_prompts=settings.log_prompts,
        )

    def limiter(self, place: WorkerPlace) -> KeyLimiter | None:
        """Counts each key's requests together with the other workers; None without limits."""
        if not self.limits.any:
            return None
        path = None
        if place.count > 1:
            # A worker that starts after the file of keys has changed counts with those that read the same keys.
            known = blake2b(b"".join(key.digest for key in self.keys.keys), digest_size=8).hexdigest()
            path = place.folder / f"keys-{known}"
        return KeyLimiter(self.limits, len(self.keys.keys), place.index, place.count, path)


def check(settings: Settings) -> None:
    """Makes sure, before any process starts, that the files and packages that settings ask for can be used.

    Raises:
        SettingsError: keys or certificates cannot be read, or a package is missing.
    """
    key_ring(settings)
    if settings.tracing:
        check_installed()
    if settings.ssl_certfile is not None and settings.ssl_keyfile is not None:
        try:
            # An empty password, so that a key that needs one is an error and no question at the console.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                settings.ssl_certfile, settings.ssl_keyfile, password=""
            )
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"--ssl-certfile {settings.ssl_certfile} with --ssl-keyfile {settings.ssl_keyfile} cannot be used: "
                f"{error.strerror or error}"
            ) from None
