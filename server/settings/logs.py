"""What all processes log, and how."""

from persimmon.server.logs import LogFormat, LogLevel
from persimmon.server.settings.section import Section, setting


class LogSettings(Section):
    """Settings of every process's log."""

    log_format: LogFormat = setting(
        "text", "Log format of all processes: plain text, or one JSON object per line.", "log"
    )
    log_level: LogLevel = setting(
        "info",
        "Least severe lines that all processes log. debug adds a line for each step of the engine; warning leaves out "
        "the access log. Libraries log warnings and errors only.",
        "log",
    )
