"""The error of a batch whose files cannot be used."""


class BatchFileError(ValueError):
    """A file that cannot be used.  The message is one line for the person who named it."""
