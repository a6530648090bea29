"""Tensors that files hold beyond those that config.json asks for: used or ignored as Transformers does.

Knows names, not files: the caller says which tensors there are, and reads two of them where their values decide.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from persimmon.model.config import PersimmonConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Settled:
    """What is read of a checkpoint's files.

    Attributes:
        config: the network that the files hold.
        names: the network's name of each stored tensor that is read, by its name in the files.
        notes: a line for each thing that was ignored, or used although config.json says otherwise.
    """

    config: PersimmonConfig
    names: Mapping[str, str]
    notes: tuple[str, ...]


def settle(stored: Collection[str], config: PersimmonConfig, equal: Callable[[], bool]) -> Settled:
    """Decides about tensors that are not in config.json's network.

    Transformers 5 does the same.  Rotary frequencies follow from config.json and are never read.  With
    tie_word_embeddings, an lm_head.weight equal to the embedding is ignored; one that differs is used; one without an
    embedding is the embedding.  A classifier has no lm_head.

    Args:
        stored: the names of all tensors in the files.
        config: what config.json says.
        equal: whether the embedding and lm_head.weight hold the same values; called only where that decides.
    """
    buffers = [name for name in stored if "rotary_emb.inv_freq" in name]
    names = {name: name for name in stored if "rotary_emb.inv_freq" not in name}
    notes: list[str] = []
    if buffers:
        more = f" (and {len(buffers) - 1} more)" if len(buffers) > 1 else ""
        notes.append(f"{buffers[0]}{more} is ignored: rotary frequencies are computed from config.json")
    if HEAD not in names:
        pass
    elif not config.generates:
        del names[HEAD]
        notes.append(f"{HEAD} is ignored: {config.architecture} does not use it")
    elif config.tie_word_embeddings and EMBEDDING not in names:
        names[HEAD] = EMBEDDING
        notes.append(
            f"{HEAD} is also used as the embedding: config.json sets tie_word_embeddings, and there is no embedding "
            f"tensor"
        )
    elif config.tie_word_embeddings and equal():
        del names[HEAD]
        notes.append(f"{HEAD} is ignored: it equals the embedding, and config.json sets tie_word_embeddings")
    elif config.tie_word_embeddings:
        config = replace(config, tie_word_embeddings=False)
        notes.append(
            f"{HEAD} is used: it differs from the embedding, although config.json sets tie_word_embeddings; set that "
            f"to false"
        )
    return Settled(config, names, tuple(notes))
