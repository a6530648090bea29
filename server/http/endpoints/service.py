"""What an API worker serves with, handed to every endpoint, and the checks that need to know the model."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version

from persimmon.model.chat import Chat, ChatPrompt
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.grammar import GrammarCompiler
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap
from persimmon.server.engine.client import EngineClient
from persimmon.server.engine.messages import Grammar, Sampling
from persimmon.server.http.endpoints.model_use import USES
from persimmon.server.http.errors import bad_request, context_length_exceeded, model_not_found
from persimmon.server.http.generation.answer_form import ANY_TEXT, AnswerForm
from persimmon.server.http.generation.generation import Generation, Generator, Prompt
from persimmon.server.http.generation.grammars import Constraint, GrammarChecker
from persimmon.server.http.generation.prompt_encoder import Fit, PromptEncoder, PromptInput
from persimmon.server.http.generation.stop_strings import StopStrings
from persimmon.server.http.middleware.gate import CHARACTERS_PER_TOKEN, Gate
from persimmon.server.http.middleware.keys import salted
from persimmon.server.http.request_record import RequestRecord
from persimmon.server.http.schemas.protocol import GenerationRequest
from persimmon.server.http.transport.siblings import Siblings
from persimmon.server.metrics import Metrics

MAX_CHOICES = 2048
"""Sequences that one request may ask for: its prompts times its n."""

MAX_ECHOED = 2**20
"""Log-probabilities of prompts that one request may ask for.  A prompt is computed once and told with each answer."""

_SEEDS = 2**63
_VERSION = version("persimmon-server")  # it is looked up in files, for 250 us, and is a part of every answer


@dataclass(frozen=True)
class Service:
    """What the endpoints share.

    Attributes:
        engine: the connection to the engine.
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
    """

    engine: EngineClient
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

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Tokenizes prompts."""
        return PromptEncoder(self.tokenizer, self.config.context_length)

    @property
    def generator(self) -> Generator:
        """Runs what `prepare` has made."""
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
        served = (_VERSION, self.served_model_name, info and info.dtype, info and info.device)
        return "fp_" + blake2b(repr(served).encode(), digest_size=5).hexdigest()

    def check_model(self, name: str | None) -> None:
        """Raises the ApiError for a model that is not the one served; None is whatever is served."""
        if name not in (None, self.served_model_name):
            raise model_not_found(str(name), self.served_model_name)

    async def prepare(
        self,
        request: GenerationRequest,
        prompts: Sequence[PromptInput],
        stop: Sequence[str],
        record: RequestRecord,
        form: AnswerForm = ANY_TEXT,
    ) -> Generation:
        """Checks a request against the model and tokenizes its prompts.

        Args:
            request: what both endpoints have in common is read from it.
            prompts: texts, conversations or token ids.
            stop: strings that end an answer, where its form lets them.
            record: of the request; what is found out is written into it.
            form: what an answer may look like.

        Raises:
            ApiError: another model's name, too many choices, an empty prompt or one that is too long, a
                token id outside the vocabulary, a priority that is too urgent, a grammar that cannot be used; or the
                server is full.
            EngineNotReadyError: the model is still loading.
            EngineDeadError: the engine has ended.
        """
        self.check_model(request.model)
        self.check_use(Architecture.CAUSAL_LM)
        limit = self.max_model_len
        field, samples = request.samples
        if len(prompts) * samples > MAX_CHOICES:
            raise bad_request(
                f"{len(prompts)} prompts with {field} = {samples} are {len(prompts) * samples} answers; "
                f"one request may ask for {MAX_CHOICES}.",
                field,
            )
        self._check_priority(request.priority, record)
        self.check_token_ids("stop_token_ids", request.stop_token_ids)
        self.check_token_ids("logit_bias", request.logit_bias)

        def fit(name: str, prompt: PromptInput, token_ids: list[int]) -> list[int]:
            if request.truncate_prompt_tokens is not None and token_ids:
                token_ids = self._shortened(request, prompt, token_ids, limit)
            _max_tokens(request, name, len(token_ids), limit)
            return token_ids

        with self.gate.reserved(len(prompts) * samples, expected_tokens(prompts), record.owner):
            begins_with_space = self._answers_begin_with_space(request, form)
            grammar = None if form.constraint is None else await self._grammar(form.constraint, begins_with_space)
            encoded = await self.encode_prompts(request.prompt_field, prompts, request.add_bos, fit)
        prompt_tokens = sum(len(token_ids) for _, token_ids in encoded)
        _check_echo(request, prompt_tokens)
        record.prompt_tokens = prompt_tokens
        record.cache_salt = salted(record.cache_salt, request.cache_salt)
        if record.prompts is not None:
            record.prompts += [
                prompt.text(self.tokenizer) if isinstance(prompt, ChatPrompt) else prompt for prompt in prompts
            ]
        stop_token_ids = list(request.stop_token_ids) if form.takes_stop_tokens else []
        if form.ends_by_grammar or not request.ignore_eos:
            stop_token_ids += self.config.eos_token_ids
            if request.is_chat:
                stop_token_ids += self.chat.end_ids
        min_tokens = 0 if form.ends_by_grammar else request.min_tokens
        return Generation(
            prompts=[
                Prompt(
                    token_ids,
                    _max_tokens(request, name, len(token_ids), limit),
                    self._sampling(request, min_tokens, grammar),
                )
                for name, token_ids in encoded
            ],
            n=request.n,
            samples=samples,
            stop_token_ids=[*dict.fromkeys(stop_token_ids)],
            stop_strings=StopStrings(stop if form.takes_stop_strings else ()),
            is_chat=request.is_chat,
            begins_with_space=begins_with_space,
            echo=request.echoes,
            logprobs=request.reported_logprobs,
            record=record,
            calls=form.calls,
            priority=request.priority,
        )

    def _check_priority(self, priority: int, record: RequestRecord) -> None:
        """Raises the ApiError of a request that is more urgent than its client may be."""
        most = self.max_priority if record.max_priority is None else record.max_priority
        if most is not None and priority < -most:
            raise bad_request(
                f"priority is {priority}, but the most urgent one that you may send is {-most}; send that or a larger "
                "number. The operator of the server sets the limit with --max-priority, or for one key with "
                "max-priority=N in its line of --api-key-file.",
                "priority",
            )

    def _shortened(
        self, request: GenerationRequest, prompt: PromptInput, token_ids: list[int], limit: int
    ) -> list[int]:
        """A prompt within the length that the request gives; BOS stays before a text, though not before a chat."""
        is_text = isinstance(prompt, str) and not request.is_chat
        begin = int(is_text and token_ids[0] == self.tokenizer.bos_token_id)
        _, asked = request.token_limit
        answer = request.default_max_tokens or 1 if asked is None else asked
        return request.shortened(token_ids, max(limit - answer, 1), "left", begin)

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

    def _answers_begin_with_space(self, request: GenerationRequest, form: AnswerForm) -> bool:
        """Whether the space that an answer begins with belongs to the chat format, or to a call that was begun."""
        begun = form.calls is not None and form.calls.begun is not None
        return request.is_chat and (self.chat.leading_space or begun)

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
        for name, prompt in zip(names, prompts, strict=True):
            if isinstance(prompt, list):
                self.check_token_ids(name, prompt)
        encoded = list(zip(names, await self.encoder.encode(names, prompts, add_bos, fit), strict=True))
        for name, token_ids in encoded:
            self._check_kept(name, token_ids)
            if not token_ids:
                raise bad_request(f"{name} is empty, and no token is put before its text; give it some.", name)
        return encoded

    def check_token_ids(self, name: str, token_ids: Iterable[int]) -> None:
        """Raises the ApiError for an id outside the vocabulary in the field `name`."""
        size = self.config.vocab_size
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
        if wrong is not None:
            raise bad_request(f"{name} holds the token id {wrong}, but this model's are 0 to {size - 1}.", name)
        self._check_kept(name, token_ids)

    def _check_kept(self, name: str, token_ids: Iterable[int]) -> None:
        if self.vocabulary is None:
            return
        dropped = next((token_id for token_id in token_ids if not self.vocabulary.kept(token_id)), None)
        if dropped is not None:
            raise bad_request(
                f"{name} holds the token id {dropped} ({self.tokenizer.pieces([dropped])[0]!r}), which this "
                "checkpoint's trimmed vocabulary lacks; leave it out.",
                name,
            )

    def seed(self, asked: int | None) -> int:
        """The seed of a prompt; without one that was asked for, a new one.

        Equal prompts in one request should not all get the same answer then.
        """
        return next(self.seeds) if asked is None else asked % _SEEDS

    def top_k(self, asked: int) -> int:
        """How many tokens to draw from; 0 where that is all."""
        choices = self.config.vocab_size if self.vocabulary is None else len(self.vocabulary.ids)
        return asked if 0 < asked < choices else 0

    async def _grammar(self, constraint: Constraint, begins_with_space: bool) -> Grammar:
        if self.additional_properties:
            constraint = constraint.opened()
        await self.grammars.check(constraint)
        grammar = constraint.grammar
        return Grammar(grammar.kind, grammar.text, begins_with_space, grammar.additional_properties)

    def _sampling(self, request: GenerationRequest, min_tokens: int, grammar: Grammar | None) -> Sampling:
        logprobs = request.reported_logprobs
        if logprobs is None and request.samples[1] > request.n:
            logprobs = 0  # the most probable samples are the answers
        return Sampling(
            request.temperature if request.top_p else 0.0,
            request.top_p or 1.0,
            self.top_k(request.top_k),
            request.min_p,
            self.seed(request.seed),
            request.repetition_penalty,
            request.presence_penalty,
            request.frequency_penalty,
            request.logit_bias,
            min_tokens,
            logprobs,
            grammar,
        )


def expected_tokens(prompts: Iterable[PromptInput]) -> int:
    """How many tokens prompts have, about, before anyone has counted them."""
    return sum(len(prompt) if isinstance(prompt, list) else len(prompt) // CHARACTERS_PER_TOKEN for prompt in prompts)


def endless_seeds(seed: int) -> Iterator[int]:
    """Seeds for requests that bring none.

    Args:
        seed: the same one gives the same sequence.
    """
    # Sampling wants reproducible seeds, not secret ones.
    draws = random.Random(seed)  # noqa: S311
    while True:
        yield draws.randrange(_SEEDS)


def _check_echo(request: GenerationRequest, prompt_tokens: int) -> None:
    """Raises the ApiError where every answer would tell more of its prompt than memory is for."""
    top = request.reported_logprobs
    if not request.echoes or top is None:
        return
    field, samples = request.samples
    told = prompt_tokens * samples * (1 + top)
    if told > MAX_ECHOED:
        raise bad_request(
            f"echo with logprobs = {top} would tell {told} log-probabilities of {prompt_tokens} prompt tokens for "
            f"{field} = {samples}; one request may ask for {MAX_ECHOED}.",
            "echo",
        )


def _max_tokens(request: GenerationRequest, name: str, prompt_tokens: int, limit: int) -> int:
    """New tokens that a prompt may get."""
    left = limit - prompt_tokens
    field, asked = request.token_limit
    if left < (asked != 0):
        raise context_length_exceeded(prompt_tokens, asked or 1, limit, name)
    if asked is None:
        most = left if request.default_max_tokens is None else min(left, request.default_max_tokens)
        if request.min_tokens > most:
            raise bad_request(
                f"Invalid 'min_tokens': it is {request.min_tokens}, but without {field} the answer to this prompt has "
                f"at most {most} tokens.",
                "min_tokens",
            )
        return most
    if asked == 0:
        return 0
    if asked > left:
        raise context_length_exceeded(prompt_tokens, asked, limit, field)
    return asked
