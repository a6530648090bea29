"""From what a person gave as the model, a path or a Hugging Face Hub id, to a folder on this machine.

Knows which files of a Hub repository a server needs.  Opens none of them.
"""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from persimmon.model.config import ADAPTER_FILE
from persimmon.model.errors import CheckpointError
from persimmon.model.vocabulary import VOCABULARY_FILE

_DESCRIPTION_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "adept_vocab.model",
    "tokenizer.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    ADAPTER_FILE,
    VOCABULARY_FILE,
]
_SAFETENSORS_FILES = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLED_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]

INCLUDED = ("demo", "demo-vision")
"""The checkpoints that come with the server, which are folders next to this file."""


def resolve(path_or_hub_id: str) -> Path:
    """The folder of a checkpoint; one that is on the Hub is fetched into huggingface_hub's cache first.

    A folder that exists wins over an included checkpoint or a Hub id of the same name.  Pickled weights are fetched
    only where there are not safetensors.  HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and the library's other variables mean what
    they always mean.

    Args:
        path_or_hub_id: a folder's path, where ~ is the home folder, "owner/name", or one of INCLUDED.

    Raises:
        CheckpointError: the folder does not exist, and the Hub has no such model that can be fetched.
    """
    if not path_or_hub_id:
        raise CheckpointError("the model's name is empty; expected a folder or a Hugging Face Hub id")
    path = Path(os.path.expanduser(path_or_hub_id))  # Path's own raises for an unknown ~user
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except OSError as error:  # no permission to look, for one
        raise CheckpointError(f"{path_or_hub_id} cannot be read: {error.strerror}") from error
    if is_file:
        raise CheckpointError(f"{path_or_hub_id} is a file; expected the folder that holds config.json and the weights")
    if path_or_hub_id in INCLUDED:
        return Path(__file__).parent / path_or_hub_id
    if path_or_hub_id.startswith(("/", ".", "~")) or path_or_hub_id.count("/") > 1:
        raise CheckpointError(f"{path_or_hub_id}: no such folder")
    if "/" not in path_or_hub_id:
        raise CheckpointError(
            f"{path_or_hub_id!r}: no such folder, and not a valid Hugging Face Hub id; those look like owner/name, "
            f"for example adept/persimmon-8b-chat"
        )
    return _fetch(path_or_hub_id)


def _fetch(hub_id: str) -> Path:
    try:
        folder = _snapshot(hub_id, _DESCRIPTION_FILES + _SAFETENSORS_FILES)
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(hub_id, _DESCRIPTION_FILES + _PICKLED_FILES)
    except Exception as error:  # errors of the HTTP library pass through, and that has changed
        raise CheckpointError(f"{hub_id}: no such folder, and {_explanation(hub_id, error)}") from error
    return folder


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))


def _explanation(hub_id: str, error: Exception) -> str:
    """Why a model was not fetched and what to do, as the second half of a sentence."""
    page = f"{huggingface_hub.constants.ENDPOINT}/{hub_id}"
    match error:
        case GatedRepoError():  # a RepositoryNotFoundError too, so it comes first
            return f"{page} is gated: accept its terms there, then set HF_TOKEN or run `hf auth login`"
        case RepositoryNotFoundError():
            return f"{page} does not exist; if it is private, set HF_TOKEN or run `hf auth login`"
        case HFValidationError():
            return "it is not a valid Hugging Face Hub id; those look like owner/name"
        case LocalEntryNotFoundError() if huggingface_hub.constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set, and the cache has no complete copy from the Hugging Face Hub"
        case LocalEntryNotFoundError():
            return f"{page} cannot be reached, and the cache has no complete copy: check the network"
        case _:
            reason = next(iter(str(error).splitlines()), "")
            return f"{page} cannot be fetched: {type(error).__name__}: {reason}"
