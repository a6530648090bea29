"""The error that everything under model/ raises for a checkpoint it cannot serve."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not of this architecture.

    The message is a single line for the person who started the server: the file, what was found, what is needed.
    """
