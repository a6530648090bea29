"""The error that code under model/ raises for a checkpoint that it cannot serve."""

_MAX_CHARACTERS = 4000


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not of this architecture.

    The message is a single line for the person who started the server: the file, what was found, what is expected.
    Names in it come from untrusted files, so control characters are escaped and the length is limited.
    """

    def __init__(self, message: str) -> None:
        shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in message)
        if len(shown) > _MAX_CHARACTERS:
            shown = f"{shown[: _MAX_CHARACTERS - 500]} … {shown[-500:]}"
        super().__init__(shown)
