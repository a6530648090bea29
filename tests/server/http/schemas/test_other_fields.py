"""Fields of OpenAI's and vLLM's APIs that this server does not implement: accepted, or refused, and documented."""

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
    chat_completion_content_part_image_param,
    chat_completion_content_part_text_param,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)

from persimmon.server.http.schemas import (
    chat,
    chat_message,
    classify,
    completions,
    embeddings,
    generation,
    tokens,
    tool_fields,
)
from persimmon.server.http.schemas.other_fields import (
    IMAGE_PARTS,
    REFUSED_PARTS,
    WITHOUT_EFFECT_IN_IMAGES,
    WITHOUT_EFFECT_IN_PARTS,
)
from persimmon.server.http.schemas.request_object import RequestObject
from tests.server.http.fake_engine import FakeEngine, says

COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    TOKENIZE: {"messages": [{"role": "user", "content": "Hi"}]},
}
KINDS: dict[str, type[RequestObject]] = {
    COMPLETIONS: completions.CompletionRequest,
    CHAT: chat.ChatCompletionRequest,
    TOKENIZE: tokens.TokenizeRequest,
}
VLLM_FIELDS: dict[type[RequestObject], str] = {
    completions.CompletionRequest: """
        model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
        stream_options suffix temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking
        length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
        spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs
        logprob_token_ids bad_words prompt_embeds add_special_tokens response_format structured_outputs priority
        request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
        return_token_offsets mm_payload return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
        repetition_detection thinking_token_budget stream_interval
    """,
    chat.ChatCompletionRequest: """
        messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
        presence_penalty response_format seed stop stream stream_options temperature top_p tools tool_choice
        reasoning_effort thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k min_p
        repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
        skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
        logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt continue_final_message
        add_special_tokens documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs
        structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids
        routed_experts_prompt_start return_token_offsets return_prompt_text mm_payload return_mm_kwargs cache_salt
        kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval
    """,
    generation.StreamOptions: "include_usage continuous_usage_stats",
    embeddings.EmbeddingRequest: """
        model user truncate_prompt_tokens padding truncation_side request_id priority mm_processor_kwargs cache_salt
        input add_special_tokens messages encoding_format embed_dtype endianness dimensions use_activation
    """,
    classify.ClassifyRequest: """
        model user truncate_prompt_tokens padding truncation_side request_id priority mm_processor_kwargs cache_salt
        input add_special_tokens use_activation
    """,
    tokens.TokenizeRequest: """
        model prompt messages add_special_tokens return_token_strs add_generation_prompt continue_final_message
        chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs tools
    """,
    tokens.DetokenizeRequest: "model tokens",
}
"""Fields of vLLM 0.32."""

OPENAI_TYPES: list[tuple[type[RequestObject], type]] = [
    (completions.CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
    (chat.ChatCompletionRequest, chat_create_params.CompletionCreateParamsStreaming),
    (embeddings.EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
    (generation.StreamOptions, ChatCompletionStreamOptionsParam),
    (chat_message.ChatMessage, ChatCompletionAssistantMessageParam),
    (chat_message.ChatMessage, ChatCompletionDeveloperMessageParam),
    (chat_message.ChatMessage, ChatCompletionSystemMessageParam),
    (chat_message.ChatMessage, ChatCompletionToolMessageParam),
    (chat_message.ChatMessage, ChatCompletionUserMessageParam),
    (tool_fields.Tool, ChatCompletionFunctionToolParam),
]


def known_fields(kind: type[RequestObject]) -> set[str]:
    own = {field.alias or name for name, field in kind.model_fields.items()}
    return own | kind.refused.keys() | kind.without_effect.keys()


@pytest.mark.parametrize(("kind", "openais"), OPENAI_TYPES, ids=lambda kind: kind.__name__)
def test_every_field_that_openais_client_can_send_is_implemented_ignored_or_refused(
    kind: type[RequestObject], openais: type
) -> None:
    assert get_type_hints(openais).keys() <= known_fields(kind)


def test_every_content_part_that_openais_client_can_send_is_read_or_refused() -> None:
    kinds = {get_args(get_type_hints(part)["type"])[0] for part in get_args(ChatCompletionContentPartParam)}
    assert kinds - {"text", *IMAGE_PARTS} <= REFUSED_PARTS.keys()
    text = get_type_hints(chat_completion_content_part_text_param.ChatCompletionContentPartTextParam)
    assert text.keys() - {"type", "text"} <= WITHOUT_EFFECT_IN_PARTS.keys()
    image = get_type_hints(chat_completion_content_part_image_param.ChatCompletionContentPartImageParam)
    assert image.keys() - {"type", "image_url"} <= WITHOUT_EFFECT_IN_IMAGES.keys()
    assert get_type_hints(chat_completion_content_part_image_param.ImageURL).keys() == {"url", "detail"}


@pytest.mark.parametrize("kind", VLLM_FIELDS, ids=lambda kind: kind.__name__)
def test_every_field_of_vllms_is_implemented_ignored_or_refused(kind: type[RequestObject]) -> None:
    assert set(VLLM_FIELDS[kind].split()) <= known_fields(kind)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_a_field_has_one_fate(kind: type[RequestObject]) -> None:
    own = {field.alias or name for name, field in kind.model_fields.items()}
    assert not own & kind.refused.keys()
    assert not own & kind.without_effect.keys()
    assert not kind.refused.keys() & kind.without_effect.keys()


def refused() -> Iterator[Any]:
    for path, kind in KINDS.items():
        for field, refusal in kind.refused.items():
            yield pytest.param(path, field, refusal.allowed, id=f"{path} {field}")


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "field", "allowed"), list(refused()))
async def test_a_refused_field_is_accepted_only_where_it_asks_for_nothing(
    http: httpx.AsyncClient, engine: FakeEngine, path: str, field: str, allowed: tuple[object, ...]
) -> None:
    engine.script = says([9])
    for value in (None, *allowed):
        assert (await http.post(path, json=BODIES[path] | {field: value})).status_code == 200, value
    response = await http.post(path, json=BODIES[path] | {field: "anything else"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert KINDS[path].refused[field].reason in error["message"]


@pytest.mark.anyio
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_what_cannot_change_an_answer_is_accepted(http: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    engine.script = says([9])
    for value in ("low", {"a": "b"}, True, None):
        body = BODIES[path] | dict.fromkeys(KINDS[path].without_effect, value)
        response = await http.post(path, json=body)
        assert response.status_code == 200, response.text


@pytest.mark.anyio
async def test_a_service_tier_is_answered_with_the_one_there_is(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    for stream in (False, True):
        for tier in ("flex", "auto"):
            response = await http.post(CHAT, json=BODIES[CHAT] | {"service_tier": tier, "stream": stream})
            assert '"service_tier":"default"' in response.text
        assert "service_tier" not in (await http.post(CHAT, json=BODIES[CHAT] | {"stream": stream})).text
