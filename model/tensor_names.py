"""What a network's tensors are called in files: Persimmon's names are the network's own, Fuyu's have a prefix.

Knows both spellings of Fuyu's names: language_model.model.* and language_model.lm_head.*, as in the public checkpoint
and in what Transformers writes; and model.language_model.* and lm_head.*, the modules of Transformers 5, which reads
both.
"""

from persimmon.model.config import PersimmonConfig

PATCH_PROJECTION = "model.vision_embed_tokens"
"""The module that makes embeddings of image patches."""

_MODULES = "model.language_model."

_FUYU_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "vision_embed_tokens.": f"{PATCH_PROJECTION}.",
    _MODULES: "model.",
}


def network_name(stored: str, config: PersimmonConfig) -> str:
    """The network's name of a tensor.

    Args:
        stored: its name in a file, or in an index.
        config: the network.
    """
    for prefix, own in _FUYU_PREFIXES.items() if config.vision is not None else ():
        if stored.startswith(prefix):
            return own + stored.removeprefix(prefix)
    return stored


def stored_name(name: str, config: PersimmonConfig) -> str:
    """The name under which Transformers writes a tensor.

    Args:
        name: the network's.
        config: the network.
    """
    if config.vision is None:
        return name
    return name.removeprefix("model.") if name.startswith(PATCH_PROJECTION) else f"language_model.{name}"


def module_name(name: str, config: PersimmonConfig) -> str:
    """The name of a module in Transformers, by which quantization_config names it.

    Args:
        name: the network's, without the name of a parameter.
        config: the network.
    """
    if config.vision is None or not name.startswith("model.") or name == PATCH_PROJECTION:
        return name
    return _MODULES + name.removeprefix("model.")
