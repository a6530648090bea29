"""From a request for generated text to what the engine is to do: checked against the model, its prompts tokenized."""

from collections.abc import Sequence
from dataclasses import replace

from persimmon.model.chat_prompt import ChatPrompt
from persimmon.model.config import Architecture
from persimmon.model.grammar import GrammarSpec
from persimmon.model.sampling_params import SamplingParams
from persimmon.server.http.endpoints.service import MAX_CHOICES, Service, expected_tokens
from persimmon.server.http.errors import bad_request, context_length_exceeded
from persimmon.server.http.generation.answer_form import ANY_TEXT, AnswerForm
from persimmon.server.http.generation.generation import Generation, Prompt
from persimmon.server.http.generation.prompt_encoder import PromptInput
from persimmon.server.http.generation.prompt_images import PromptImages, cut_image
from persimmon.server.http.generation.slices import in_slices
from persimmon.server.http.generation.stop_strings import StopStrings
from persimmon.server.http.middleware.keys import salted
from persimmon.server.http.request_record import RequestRecord
from persimmon.server.http.schemas.constraint import Constraint
from persimmon.server.http.schemas.generation import GenerationRequest

MAX_ECHOED = 2**20
"""Log-probabilities of prompts that one request may ask for.

A prompt is computed once, but reported with each answer.
"""

_PROMPTS_AT_ONCE = 128
"""Prompts whose limits and sampling are found before other requests have a turn: about a millisecond's work."""


async def prepare(
    service: Service,
    request: GenerationRequest,
    prompts: Sequence[PromptInput],
    stop: Sequence[str],
    record: RequestRecord,
    form: AnswerForm = ANY_TEXT,
) -> Generation:
    """Checks a request against the model and tokenizes its prompts.

    Args:
        service: what the worker serves with.
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
    service.check_model(request.model)
    service.check_use(Architecture.CAUSAL_LM)
    limit = service.max_model_len
    field, samples = request.samples
    if len(prompts) * samples > MAX_CHOICES:
        raise bad_request(
            f"{len(prompts)} prompts with {field} = {samples} make {len(prompts) * samples} answers; one request may "
            f"ask for at most {MAX_CHOICES}.",
            field,
        )
    _check_priority(service, request.priority, record)
    service.check_token_ids("stop_token_ids", request.stop_token_ids)
    service.check_token_ids("logit_bias", request.logit_bias)

    def fit(name: str, prompt: PromptInput, token_ids: list[int]) -> list[int]:
        image_tokens = prompt.num_image_tokens if isinstance(prompt, ChatPrompt) else 0
        if request.truncate_prompt_tokens is not None and token_ids:
            token_ids = _shortened(service, request, prompt, token_ids, limit)
        _max_tokens(request, name, len(token_ids), limit, image_tokens)
        return token_ids

    with service.gate.reserved(len(prompts) * samples, expected_tokens(prompts), record.owner):
        begins_with_space = _answers_begin_with_space(service, request, form)
        grammar = None if form.constraint is None else await _grammar(service, form.constraint, begins_with_space)
        encoded = await service.encode_prompts(request.prompt_field, prompts, request.add_bos, fit)
        prompt_tokens = sum(len(token_ids) for _, token_ids in encoded)
        _check_echo(request, prompt_tokens)
        min_tokens = 0 if form.ends_by_grammar else request.min_tokens
        checked = [
            Prompt(
                token_ids=token_ids,
                max_tokens=_max_tokens(request, name, len(token_ids), limit),
                sampling=_sampling(service, request, min_tokens, grammar),
                images=PromptImages.of(prompt, token_ids, name),
            )
            async for prompt, (name, token_ids) in in_slices(zip(prompts, encoded, strict=True), _PROMPTS_AT_ONCE)
        ]
    record.prompt_tokens = prompt_tokens
    record.cache_salt = salted(record.cache_salt, request.cache_salt)
    if record.prompts is not None:
        record.prompts += [
            prompt.text(service.tokenizer) if isinstance(prompt, ChatPrompt) else prompt for prompt in prompts
        ]
    stop_token_ids = list(request.stop_token_ids) if form.takes_stop_tokens else []
    if form.ends_by_grammar or not request.ignore_eos:
        stop_token_ids += service.config.eos_token_ids
        if request.is_chat:
            stop_token_ids += service.chat.end_ids
    return Generation(
        prompts=checked,
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
        speculate=request.speculate,
    )


def _check_priority(service: Service, priority: int, record: RequestRecord) -> None:
    """Raises the ApiError of a request that is more urgent than its client may be."""
    most = service.max_priority if record.max_priority is None else record.max_priority
    if most is not None and priority < -most:
        raise bad_request(
            f"priority is {priority}, but the lowest one that you may send is {-most}. The server's operator sets "
            f"this limit with --max-priority, or for one key with max-priority=N in its line of --api-key-file.",
            "priority",
        )


def _shortened(
    service: Service, request: GenerationRequest, prompt: PromptInput, token_ids: list[int], limit: int
) -> list[int]:
    """A prompt within the length that the request gives; BOS stays before a text, though not before a chat."""
    is_text = isinstance(prompt, str) and not request.is_chat
    begin = int(is_text and token_ids[0] == service.tokenizer.bos_token_id)
    _, asked = request.token_limit
    answer = request.default_max_tokens or 1 if asked is None else asked
    shortened = request.shortened(token_ids, max(limit - answer, 1), "left", begin)
    if len(shortened) < len(token_ids) and isinstance(prompt, ChatPrompt) and prompt.images:
        raise cut_image(len(token_ids))
    return shortened


def _answers_begin_with_space(service: Service, request: GenerationRequest, form: AnswerForm) -> bool:
    """Whether the space that an answer begins with belongs to the chat format, or to a call that was begun."""
    begun = form.calls is not None and form.calls.begun is not None
    return request.is_chat and (service.chat.leading_space or begun)


async def _grammar(service: Service, constraint: Constraint, begins_with_space: bool) -> GrammarSpec:
    if service.additional_properties:
        constraint = constraint.opened()
    await service.grammars.check(constraint)
    grammar = constraint.grammar
    return replace(grammar, leading_space=begins_with_space)


def _sampling(
    service: Service, request: GenerationRequest, min_tokens: int, grammar: GrammarSpec | None
) -> SamplingParams:
    logprobs = request.reported_logprobs
    if logprobs is None and request.samples[1] > request.n:
        logprobs = 0  # the most probable samples are the answers
    return SamplingParams(
        temperature=request.temperature if request.top_p else 0.0,
        top_p=request.top_p or 1.0,
        top_k=_top_k(service, request.top_k),
        min_p=request.min_p,
        seed=service.seed(request.seed),
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        min_tokens=min_tokens,
        logprobs=logprobs,
        grammar=grammar,
    )


def _top_k(service: Service, asked: int) -> int:
    """How many tokens to draw from; 0 where that is all."""
    choices = service.config.vocab_size if service.vocabulary is None else len(service.vocabulary.ids)
    return asked if 0 < asked < choices else 0


def _check_echo(request: GenerationRequest, prompt_tokens: int) -> None:
    """Raises the ApiError if the answers would report more log-probabilities of the prompts than memory allows."""
    top = request.reported_logprobs
    if not request.echoes or top is None:
        return
    field, samples = request.samples
    reported = prompt_tokens * samples * (1 + top)
    if reported > MAX_ECHOED:
        raise bad_request(
            f"echo with logprobs = {top} would report {reported} log-probabilities of {prompt_tokens} prompt tokens "
            f"for {field} = {samples}; one request may ask for at most {MAX_ECHOED}.",
            "echo",
        )


def _max_tokens(request: GenerationRequest, name: str, prompt_tokens: int, limit: int, image_tokens: int = 0) -> int:
    """New tokens that a prompt may get."""
    left = limit - prompt_tokens
    field, asked = request.token_limit
    if left < (asked != 0):
        raise context_length_exceeded(prompt_tokens, asked or 1, limit, name, image_tokens)
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
        raise context_length_exceeded(prompt_tokens, asked, limit, field, image_tokens)
    return asked
