"""Finds the checkpoint that settings name, and checks, before any process starts, what is quick to check.

Knows files; loads no weights.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from persimmon import model
from persimmon.model.chat import chat_format
from persimmon.model.config import PersimmonConfig, check_vocabulary
from persimmon.model.hub import resolve
from persimmon.model.images import ImageSettings
from persimmon.model.memory_limits import memory_left
from persimmon.model.shard import check_divides
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap
from persimmon.server.config import Settings
from persimmon.server.http.endpoints.model_use import ModelUse, use_of
from persimmon.server.memory_need import check_memory

DEMO_NAME = "persimmon-demo"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A checkpoint that can probably be served.

    Attributes:
        folder: its files.
        name: in the API.
        use: what it is for.
        notices: lines for the person who starts the server: what it is, and what is unusual about it.
    """

    folder: Path
    name: str
    use: ModelUse
    notices: tuple[str, ...]

    @classmethod
    def find(cls, settings: Settings, api_workers: int, engines: int = 1) -> "ServedModel":
        """The checkpoint of --model, which is downloaded if it is on the Hub.

        Args:
            settings: of the server.
            api_workers: processes that there must be memory for, next to the engines.
            engines: how many there are.

        Raises:
            CheckpointError: it cannot be found, or is not one that this server serves.
            SettingsError: there is not enough memory for the processes.
        """
        if settings.model is None:
            folder = Path(next(iter(model.__path__)), "demo")
            name = settings.served_model_name or DEMO_NAME
            what = "the demo checkpoint, which explains common English words; use --model to serve another"
        else:
            folder = resolve(settings.model)
            name = settings.served_model_name or Path(settings.model).resolve().name
            what = str(settings.model)
        config = PersimmonConfig.from_folder(folder)
        check_divides(config, settings.tensor_parallel_size)
        ranks = settings.tensor_parallel_size
        check_memory(config, api_workers, memory_left(), ranks=ranks, engines=engines)
        tokenizer = Tokenizer.from_folder(folder, add_bos=settings.add_bos_token)
        vocabulary = VocabularyMap.from_folder(folder, config)
        check_vocabulary(folder, vocabulary.original(config) if vocabulary else config, tokenizer.vocab_size)
        chat = chat_format(folder, config, tokenizer, settings.add_bos_token)
        notices = [f"persimmon {version('persimmon-server')}: {what}"]
        notices += [f"persimmon: {notice}" for notice in tokenizer.notices]
        if chat.template is not None:
            notices.append("persimmon: conversations use the checkpoint's own chat template")
        if config.vision is not None:
            ImageSettings.from_folder(folder, config.vision)
            if not chat.takes_images:
                notices.append("persimmon: images are refused, because the chat template has no place for them")
        return cls(folder, name, use_of(config), tuple(notices))
