"""What is read from files that may change while the server runs: API keys, and the certificate of HTTPS.

Knows which settings name them; what they let in is others' part.
"""

import signal
from dataclasses import dataclass, field

from persimmon.server.config import Settings
from persimmon.server.http.middleware.keys import KeyRing, key_ring
from persimmon.server.http.transport.tls import Certificate


@dataclass(slots=True)
class Credentials:
    """What is in the files now.

    Attributes:
        keys: that are let in.
        certificate: of HTTPS; None for plain HTTP.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    certificate: Certificate | None = None

    @classmethod
    def read(cls, settings: Settings) -> "Credentials":
        """What the settings name.

        Raises:
            SettingsError: a file cannot be used.
        """
        return cls(key_ring(settings), Certificate.read(settings))

    def read_again(self, settings: Settings) -> None:
        """Takes what is in the files now: all of it, or nothing.

        Raises:
            SettingsError: a file cannot be used.
        """
        new = Credentials.read(settings)
        self.keys, self.certificate = new.keys, new.certificate


def reads_files_again(settings: Settings) -> bool:
    """Whether SIGHUP has files read again: there are some, and the signal is not ignored, as with nohup."""
    has_files = settings.api_key_file is not None or settings.ssl_certfile is not None
    return has_files and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
