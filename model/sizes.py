"""Bytes as text for people."""


def readable(count: int) -> str:
    """Bytes for people, like 1.5 MiB or 17.50 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
