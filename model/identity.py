"""Which files a checkpoint consisted of at some moment, so that a later replacement is noticed.

Compares sizes, times and inodes, not contents: weights take minutes to read.
"""

import os
from collections.abc import Mapping
from pathlib import Path

_PATTERNS = (
    *("config.json", "generation_config.json", "adapter_config.json", "vocabulary_map.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "adept_vocab.*", "chat_template*"),
    *("*.safetensors", "pytorch_model*.bin", "*.index.json"),
)

Identity = Mapping[str, tuple[int, int, int]]
"""Of each file that a server reads, by its name: size in bytes, time of its last change in ns, inode."""


def identity(folder: Path) -> Identity:
    """The files of a checkpoint as they are now; without those that cannot be looked at."""
    found = {}
    for path in {path for pattern in _PATTERNS for path in folder.glob(pattern)}:
        try:
            status = os.stat(path)  # of what a link leads to
        except OSError:
            continue
        found[path.name] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def change(before: Identity, after: Identity) -> str | None:
    """The first difference between two moments, like 'config.json was deleted'; None where there is none."""
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            return f"{name} was deleted"
        if name not in before:
            return f"{name} was added"
        if before[name] != after[name]:
            return f"{name} was replaced or changed"
    return None
