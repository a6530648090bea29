"""PUT /api: the API of Adept's own server, for programs that were written for it.

What it does differently from completions is Adept's: no beginning-of-sequence token unless asked for, answers together
with their prompts, end-of-text as text.  Errors are this server's, with its statuses: Adept's answers most bad requests
with status 200 and a sentence.
"""

from collections.abc import Sequence

from persimmon.model.tokenizer import Tokenizer
from persimmon.server.http.endpoints.endpoint import Call
from persimmon.server.http.endpoints.preparation import prepare
from persimmon.server.http.endpoints.service import Service, expected_tokens
from persimmon.server.http.errors import bad_request, context_length_exceeded
from persimmon.server.http.generation.generation import Generation
from persimmon.server.http.generation.pieces import Answer
from persimmon.server.http.generation.prompt_encoder import PromptInput
from persimmon.server.http.generation.token_report import token_text
from persimmon.server.http.schemas.adept import AdeptAnswer, AdeptRequest
from persimmon.server.http.transport.disconnect import until_disconnect
from persimmon.server.http.transport.json_response import JsonResponse

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as SentencePiece's pieces have it


async def adept(service: Service, call: Call[AdeptRequest]) -> JsonResponse[AdeptAnswer]:
    """Continues one or more prompts, as Adept's own server does."""
    request = call.request
    if request.add_bos and service.tokenizer.bos_token_id is None:
        raise bad_request("This model's vocabulary has no beginning-of-sequence token to add.", "add_BOS")
    limit = service.max_model_len

    def fit(name: str, prompt: PromptInput, token_ids: list[int]) -> list[int]:
        if len(token_ids) > limit:
            raise context_length_exceeded(len(token_ids), min(request.tokens_to_generate, 1), limit, name)
        return token_ids

    with service.gate.reserved(len(request.prompts), expected_tokens(request.prompts), call.record.owner):
        encoded = await service.encode_prompts("prompts", request.prompts, request.add_bos, fit)
    prompts = [token_ids for _, token_ids in encoded]
    # Adept's server generates what the longest prompt leaves room for, where that is less than was asked for.
    left = max(1, limit - max(map(len, prompts)))
    completion = request.completion(min(request.tokens_to_generate, left))
    generation = await prepare(service, completion, prompts, [], call.record)
    answers, _ = await until_disconnect(call.receive, service.generator.answers(generation))
    return JsonResponse(await _answer(service, request, generation, answers))


async def _answer(
    service: Service, request: AdeptRequest, generation: Generation, answers: list[Answer]
) -> AdeptAnswer:
    tokenizer = service.tokenizer
    begin = token_text(tokenizer, generation.prompts[0].token_ids[0]).name if request.add_bos else ""
    ends = [_end(tokenizer, answer) for answer in answers]
    # What comes before a text's first space is not part of the text, unless something is written before it.
    texts = [
        begin + tokenizer.decode([*prompt.token_ids, *answer.token_ids], from_start=not begin) + end
        for prompt, answer, end in zip(generation.prompts, answers, ends, strict=True)
    ]
    logprobs = None
    if request.logprobs:
        logprobs = [[own.logprob for own in answer.reports if own.logprob is not None] for answer in answers]
    if request.tokens_to_generate == 0:
        return AdeptAnswer(text=texts, logprobs=logprobs, generations=[], human_readable_tokens=[])
    continuations = [tokenizer.decode(answer.token_ids, from_start=True) for answer in answers]
    encoded_again = await service.encoder.encode(["prompts"] * len(continuations), continuations, add_bos=False)
    readable = [
        _readable(tokenizer, token_ids) + ([end] if end else [])
        for token_ids, end in zip(encoded_again, ends, strict=True)
    ]
    generations = [text + end for text, end in zip(continuations, ends, strict=True)]
    return AdeptAnswer(text=texts, logprobs=logprobs, generations=generations, human_readable_tokens=readable)


def _end(tokenizer: Tokenizer, answer: Answer) -> str:
    """The end-of-text token as text, where it ended an answer: in Adept's vocabulary it is a text like others."""
    return token_text(tokenizer, answer.token_ids[-1]).name if answer.finish_reason == "stop" else ""


def _readable(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """The pieces of a text with spaces as spaces, without the one that SentencePiece puts before it."""
    pieces = tokenizer.pieces(token_ids)
    return [piece.removeprefix(_SPACE).replace(_SPACE, " ") for piece in pieces[:1]] + [
        piece.replace(_SPACE, " ") for piece in pieces[1:]
    ]
