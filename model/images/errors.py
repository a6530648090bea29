"""The error for an image that cannot be read."""


class ImageError(ValueError):
    """An image is damaged, too large, or of a format that is not read.

    The message is one sentence for the client: what was given, what is allowed.
    """
