"""What all processes log, and how."""

from typing import Literal

from persimmon.server.settings.section import Section, setting


class LogSettings(Section):
    """Settings of every process's log."""

    log_format: Literal["text", "json"] = setting(
        "text", "Log format of all processes: plain text, or one JSON object per line.", "log"
    )
