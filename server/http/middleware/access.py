"""Who may ask what of the HTTP server, as the settings say; and whether what they name can be used at all.

Knows settings and files. It does not apply them.
"""

from dataclasses import dataclass, field

from persimmon.server.config import Settings
from persimmon.server.http.middleware.authentication import KeyCheck
from persimmon.server.http.middleware.credentials import Credentials
from persimmon.server.http.middleware.key_limits import KeyLimiter, KeyLimits
from persimmon.server.http.middleware.keys import KeyRing, key_ring
from persimmon.server.http.middleware.tracing import check_installed
from persimmon.server.http.transport.siblings import WorkerPlace
from persimmon.server.settings.engine import MAX_BODY_BYTES


@dataclass(frozen=True, slots=True)
class Access:
    """What every API worker asks of clients.

    Attributes:
        keys: one of these, where there are any.
        limits: of each key.
        max_priority: how urgent requests may be whose key has no number of its own; None for any urgency.
        metrics_need_key: whether metrics require a key.
        allowed_origins: of web pages that may ask from a browser.
        max_body_bytes: of a request.
        read_timeout: seconds that a client may take to send its headers, and pause in its body.
        log_prompts: whether the access log contains prompts.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    limits: KeyLimits = field(default_factory=KeyLimits)
    max_priority: int | None = None
    metrics_need_key: bool = False
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    read_timeout: float = 30.0
    log_prompts: bool = False

    @classmethod
    def of(cls, settings: Settings, keys: KeyRing | None = None) -> "Access":
        """What the settings say.

        Args:
            settings: of the server.
            keys: in place of those that the settings name.

        Raises:
            SettingsError: the keys cannot be read.
        """
        return cls(
            keys=key_ring(settings) if keys is None else keys,
            limits=KeyLimits(settings.max_concurrent_requests_per_key, settings.requests_per_minute_per_key),
            max_priority=settings.max_priority,
            metrics_need_key=settings.protect_metrics,
            allowed_origins=settings.allowed_origins or (),
            max_body_bytes=settings.max_body_size,
            read_timeout=settings.read_timeout,
            log_prompts=settings.log_prompts,
        )

    def key_check(self, place: WorkerPlace) -> KeyCheck:
        """The keys, each held to its limits; requests are counted together with those of the other workers."""
        if not self.limits.any:
            return KeyCheck(self.keys)
        folder = place.folder if place.count > 1 else None
        return KeyCheck(
            self.keys,
            KeyLimiter(
                limits=self.limits, keys=self.keys.digests, worker=place.index, workers=place.count, folder=folder
            ),
        )


def check(settings: Settings) -> None:
    """Makes sure, before any process starts, that the files and packages that settings ask for can be used.

    Raises:
        SettingsError: keys or certificates cannot be read, or a package is missing.
    """
    Credentials.read(settings)
    if settings.tracing:
        check_installed()
