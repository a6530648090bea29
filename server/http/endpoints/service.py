"""What an API worker serves with, handed to every endpoint, and the checks that need to know the model."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version

from starlette.types import Receive

from persimmon.model.chat import Chat
from persimmon.model.chat_prompt import ChatPrompt
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.grammar import GrammarCompiler
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap
from persimmon.server.engine.engines import EngineAccess
from persimmon.server.http.endpoints.model_use import USES
from persimmon.server.http.errors import bad_request, model_not_found
from persimmon.server.http.generation.conversation import Images
from persimmon.server.http.generation.generator import Generator
from persimmon.server.http.generation.grammars import GrammarChecker
from persimmon.server.http.generation.image_loader import ImageLoader
from persimmon.server.http.generation.prompt_encoder import Fit, PromptEncoder, PromptInput
from persimmon.server.http.generation.slices import in_slices
from persimmon.server.http.middleware.gate import CHARACTERS_PER_TOKEN, Gate
from persimmon.server.http.schemas.chat_message import ChatMessage
from persimmon.server.http.schemas.other_fields import REFUSED_IMAGES
from persimmon.server.http.transport.disconnect import until_disconnect
from persimmon.server.http.transport.siblings import Siblings
from persimmon.server.metrics import Metrics

MAX_CHOICES = 2048
"""Sequences that one request may ask for: its prompts times its n."""

_CHECKED_AT_ONCE = 16_384
"""Token ids that are checked before other requests have a turn: about a millisecond's work."""

_SEEDS = 2**63
_VERSION = version("persimmon-server")  # it is looked up in files, for 250 us, and is a part of every answer


@dataclass(frozen=True)
class Service:
    """What the endpoints share.

    Attributes:
        engine: the connection to the engine, or to all engines.
        tokenizer: the served model's.
        config: the served model's.
        served_model_name: its name in the API.
        metrics: what this worker measures.
        seeds: gives a seed to each prompt of a request that brings none.
        siblings: all API workers of the server.
        gate: who is let in.
        chat: the served model's chat format.
        vocabulary: of a trimmed checkpoint, whose embedding lacks some of the token ids; else None.
        created: when the server started, in seconds since 1970.
        max_priority: how urgent a request may be whose key has no number of its own; None for any urgency.
        grammars: checks what clients want answers to look like.
        additional_properties: whether objects of JSON schemas are open where neither schema nor request says.
        images: reads the images of requests; None where the model reads none.
    """

    engine: EngineAccess
    tokenizer: Tokenizer
    config: PersimmonConfig
    served_model_name: str
    metrics: Metrics
    seeds: Iterator[int]
    siblings: Siblings
    gate: Gate
    chat: Chat
    vocabulary: VocabularyMap | None
    created: int
    max_priority: int | None = None
    grammars: GrammarChecker = field(default_factory=lambda: GrammarChecker(GrammarCompiler.for_checking()))
    additional_properties: bool = False
    images: ImageLoader | None = None

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Tokenizes prompts."""
        return PromptEncoder(self.tokenizer, self.config.context_length)

    @property
    def generator(self) -> Generator:
        """Runs generations."""
        return Generator(self.engine, self.tokenizer, self.metrics)

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together.

        Raises:
            EngineNotReadyError: the model is still loading.
            EngineDeadError: the engine has ended.
        """
        return self.engine.check_ready().max_model_len

    @property
    def system_fingerprint(self) -> str:
        """Changes when answers to the same request with the same seed may: with the server, the model or the device."""
        info = self.engine.info
        computed = info and (info.dtype, info.weights, info.cache_dtype, info.device)
        served = (_VERSION, self.served_model_name, computed)
        return "fp_" + blake2b(repr(served).encode(), digest_size=5).hexdigest()

    def check_model(self, name: str | None) -> None:
        """Raises the ApiError for a model that is not the one served; None is whatever is served."""
        if name not in (None, self.served_model_name):
            raise model_not_found(str(name), self.served_model_name)

    def check_use(self, needed: Architecture) -> None:
        """Raises the ApiError of an endpoint that cannot use the served model, which is of another kind than needed."""
        served = self.config.architecture
        if served is not needed:
            use = USES[served]
            raise bad_request(
                f"This endpoint needs a model that {USES[needed].does}, but {self.served_model_name!r} ({served}) "
                f"{use.does}; use {use.endpoints} with it, or /v1/embeddings.",
                "model",
                "unsupported_by_model",
            )

    async def load_images(self, messages: Sequence[ChatMessage], receive: Receive) -> Images:
        """The images in the messages of a request, read.

        Args:
            messages: of the request.
            receive: its ASGI channel, its body read to the end.

        Raises:
            ApiError: the model reads none, or one of them or all together cannot be read.
            ClientDisconnect: the client left before.
        """
        first = next(((number, part) for number, own in enumerate(messages) for part in own.images), None)
        if first is None:
            return {}
        number, part = first
        place = f"messages[{number}].content[{part.number}]"
        if self.images is None:
            raise bad_request(
                f"'{place}.type' is not supported by this server: {REFUSED_IMAGES.reason}; {REFUSED_IMAGES.instead}.",
                f"{place}.type",
                "unsupported_parameter",
            )
        if not self.chat.takes_images:
            raise bad_request(
                f"'{place}' is an image, but this model's chat template has no place for images; send text only.",
                place,
                "unsupported_parameter",
            )
        info = self.engine.info
        limit = self.config.context_length if info is None else info.max_model_len
        return await until_disconnect(receive, self.images.load(messages, limit, self.metrics))

    async def encode_prompts(
        self,
        field: str,
        prompts: Sequence[PromptInput],
        add_bos: bool | None = None,
        fit: Fit = lambda name, prompt, token_ids: token_ids,
    ) -> list[tuple[str, list[int]]]:
        """The token ids of a request's prompts, at least one each, with the place of each in the request.

        Args:
            field: of the request that holds the prompts.
            prompts: texts, conversations or token ids.
            add_bos: as `PromptEncoder.encode` has it.
            fit: as `PromptEncoder.encode` has it.

        Raises:
            ApiError: a prompt that is empty or too long, or a token id outside the vocabulary.
        """
        names = [field if len(prompts) == 1 else f"{field}[{index}]" for index in range(len(prompts))]
        async for name, prompt in in_slices(zip(names, prompts, strict=True), _CHECKED_AT_ONCE, _cost_of_check):
            if isinstance(prompt, list):
                self.check_token_ids(name, prompt)
        encoded = list(zip(names, await self.encoder.encode(names, prompts, add_bos, fit), strict=True))
        async for name, token_ids in in_slices(encoded, _CHECKED_AT_ONCE, _cost_of_check):
            self._check_kept(name, token_ids)
            if not token_ids:
                raise bad_request(f"{name} is empty; send at least one character.", name)
        return encoded

    def check_token_ids(self, name: str, token_ids: Iterable[int]) -> None:
        """Raises the ApiError for an id outside the vocabulary in the field `name`."""
        size = self.config.vocab_size
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
        if wrong is not None:
            raise bad_request(
                f"{name} contains the token id {wrong}; this model's token ids are 0 to {size - 1}.", name
            )
        self._check_kept(name, token_ids)

    def _check_kept(self, name: str, token_ids: Iterable[int]) -> None:
        if self.vocabulary is None:
            return
        dropped = next((token_id for token_id in token_ids if not self.vocabulary.kept(token_id)), None)
        if dropped is not None:
            raise bad_request(
                f"{name} contains the token id {dropped} ({self.tokenizer.pieces([dropped])[0]!r}), which is not in "
                "this checkpoint's trimmed vocabulary; leave it out.",
                name,
            )

    def seed(self, asked: int | None) -> int:
        """The seed of a prompt; without one that was asked for, a new one.

        Equal prompts in one request should not all get the same answer then.
        """
        return next(self.seeds) if asked is None else asked % _SEEDS


def _cost_of_check(named: tuple[str, PromptInput]) -> int:
    """How many tokens are checked of a prompt, at least 1."""
    _, prompt = named
    return max(1, len(prompt)) if isinstance(prompt, list) else 1


def expected_tokens(prompts: Iterable[PromptInput]) -> int:
    """How many tokens prompts have, about, before anyone has counted them."""

    def expected(prompt: PromptInput) -> int:
        if isinstance(prompt, list):
            return len(prompt)
        images = prompt.num_image_tokens if isinstance(prompt, ChatPrompt) else 0
        return images + len(prompt) // CHARACTERS_PER_TOKEN

    return sum(map(expected, prompts))


def endless_seeds(seed: int) -> Iterator[int]:
    """Seeds for requests that bring none.

    Args:
        seed: the same one gives the same sequence.
    """
    # Sampling wants reproducible seeds, not secret ones.
    draws = random.Random(seed)  # noqa: S311
    while True:
        yield draws.randrange(_SEEDS)
