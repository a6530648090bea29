"""Fields of OpenAI's and vLLM's APIs that this server does not implement: which it ignores, which it refuses, and why.

A field that cannot change an answer is accepted, whatever its value.  One that asks for something else than this
server does is refused by name.  docs/reference/fields.md is made from these.  Knows nothing of the fields that are
implemented.
"""

from persimmon.server.http.schemas.request_object import Refusal, Refused, WithoutEffect

_NO_REASONING = "the model does not reason before it answers"
_ANSWERS = "answers are text"
_AS_THE_CHECKPOINT_SAYS = "images are prepared as the checkpoint says"
_NO_AUDIO = "the model does not process audio"
_NO_TRANSFER = "servers do not share their KV caches"
_STRUCTURED_OUTPUTS = "vLLM replaced it in version 0.12"

WITHOUT_EFFECT: WithoutEffect = {
    "metadata": "it labels requests that OpenAI stores",
    "prompt_cache_key": "prompts share cached prefixes by their tokens; cache_salt keeps them apart",
    "prompt_cache_options": "the prefix cache needs no hints",
    "prompt_cache_retention": "the prefix cache keeps what fits",
    "return_mm_kwargs": "it does not change the answer",
    "safety_identifier": "it names the end user",
    "session_id": "requests of a conversation share cached prefixes without it",
    "spaces_between_special_tokens": "an answer's text never contains special tokens",
    "store": "nothing is stored",
    "thinking_token_budget": _NO_REASONING,
    "user": "it names the end user",
}
"""Of completions and chat."""

WITHOUT_EFFECT_IN_CHAT: WithoutEffect = {
    **WITHOUT_EFFECT,
    "add_special_tokens": "the chat format sets them",
    "include_reasoning": _NO_REASONING,
    "prediction": "it only affects speed",
    "reasoning_effort": _NO_REASONING,
    "verbosity": "the model has not been trained to vary it",
}

WITHOUT_EFFECT_IN_MESSAGES: WithoutEffect = {
    "annotations": "they annotate an answer's text",
    "cache_control": "the prefix cache needs no hints",
    "parsed": "OpenAI's client makes it from the content",
    "provider_specific_fields": "LiteLLM adds it to answers",
    "reasoning": "earlier reasoning is not shown to the model",
    "reasoning_content": "earlier reasoning is not shown to the model",
    "reasoning_details": "earlier reasoning is not shown to the model",
    "thinking_blocks": "earlier reasoning is not shown to the model",
}

WITHOUT_EFFECT_IN_PARTS: WithoutEffect = {
    "annotations": "they annotate an answer's text",
    "cache_control": "the prefix cache needs no hints",
    "prompt_cache_breakpoint": "the prefix cache needs no hints",
}

WITHOUT_EFFECT_IN_IMAGES: WithoutEffect = {
    **WITHOUT_EFFECT_IN_PARTS,
    "detail": "the model reads images at their own size, up to its largest",
    "uuid": "images are known by their content",
}

WITHOUT_EFFECT_IN_TOOLS: WithoutEffect = {"cache_control": "the prefix cache needs no hints"}

WITHOUT_EFFECT_IN_CALLS: WithoutEffect = {
    **WITHOUT_EFFECT_IN_TOOLS,
    "provider_specific_fields": "LiteLLM adds it to answers",
}

WITHOUT_EFFECT_IN_POOLING: WithoutEffect = {"user": "it names the end user"}
"""Of embeddings and classification."""

REFUSED: Refused = {
    "allowed_token_ids": Refusal(
        "it is not implemented", instead="use structured_outputs, or a logit_bias of -100 for forbidden tokens"
    ),
    "bad_words": Refusal("it is not implemented", ([],), "give their token ids a logit_bias of -100"),
    "ec_transfer_params": Refusal("the model has no encoder"),
    "guided_choice": Refusal(_STRUCTURED_OUTPUTS, instead="use structured_outputs.choice"),
    "guided_decoding_backend": Refusal("there is one backend"),
    "guided_grammar": Refusal(_STRUCTURED_OUTPUTS, instead="use structured_outputs.grammar"),
    "guided_json": Refusal(_STRUCTURED_OUTPUTS, instead="use structured_outputs.json"),
    "guided_json_object": Refusal(_STRUCTURED_OUTPUTS, (False,), "use structured_outputs.json_object"),
    "guided_regex": Refusal(_STRUCTURED_OUTPUTS, instead="use structured_outputs.regex"),
    "guided_whitespace_pattern": Refusal("whitespace between JSON's tokens is fixed"),
    "include_stop_str_in_output": Refusal("answers end before a stop string", (False,)),
    "kv_transfer_params": Refusal(_NO_TRANSFER),
    "length_penalty": Refusal("it belongs to beam search, which is not implemented", (1,)),
    "logprob_token_ids": Refusal("it is not implemented", instead="use logprobs, which gives the most probable tokens"),
    "media_io_kwargs": Refusal(_AS_THE_CHECKPOINT_SAYS, ({},)),
    "mm_payload": Refusal("it is not implemented", instead="send images as content parts of messages"),
    "mm_processor_kwargs": Refusal(_AS_THE_CHECKPOINT_SAYS, ({},)),
    "moderation": Refusal("answers are not moderated"),
    "prompt_logprobs": Refusal("it is not implemented", instead="use completions with echo and logprobs"),
    "repetition_detection": Refusal("it is not implemented", instead="use the penalties and max_tokens"),
    "request_id": Refusal("a request's id is a header", instead="send the header X-Request-Id"),
    "return_token_offsets": Refusal("it is not implemented", (False,)),
    "return_tokens_as_token_ids": Refusal("it is not implemented", (False,), "use return_token_ids"),
    "routed_experts_prompt_start": Refusal("the model has no experts", (0,)),
    "skip_special_tokens": Refusal(
        "an answer's text never contains special tokens", (True,), "use return_token_ids and /detokenize"
    ),
    "stream_interval": Refusal("chunks are sent as soon as tokens are generated", (1,)),
    "use_beam_search": Refusal("it is not implemented", (False,), "use best_of of completions"),
    "vllm_xargs": Refusal("they are for extensions of vLLM", ({},)),
    "watermarking": Refusal("it is not implemented", (False,)),
}
"""Of completions and chat."""

REFUSED_IN_COMPLETIONS: Refused = {
    **REFUSED,
    "prompt_embeds": Refusal("prompts are texts or token ids"),
    "suffix": Refusal("the model was not trained to insert text", ("",)),
}

REFUSED_IN_CHAT: Refused = {
    **REFUSED,
    "add_generation_prompt": Refusal("the answer is a new turn of the assistant", (True,), "use completions"),
    "audio": Refusal(_NO_AUDIO),
    "best_of": Refusal("it is not implemented for chat", (1,), "use completions"),
    "chat_template": Refusal(
        "the server uses the checkpoint's template", instead="use completions with a rendered prompt"
    ),
    "continue_final_message": Refusal(
        "the answer is a new turn of the assistant", (False,), "use completions with the conversation as its prompt"
    ),
    "documents": Refusal("the chat format has no place for them", ([],), "include them in a message"),
    "echo": Refusal("an answer is always a new message", (False,)),
    "function_call": Refusal("OpenAI replaced it", ("none", "auto"), "use tool_choice"),
    "functions": Refusal("OpenAI replaced it", ([],), "use tools"),
    "modalities": Refusal(_ANSWERS, (["text"],)),
    "return_prompt_text": Refusal("it is not implemented", (False,), "use return_token_ids and /detokenize"),
    "web_search_options": Refusal("the server does not search the web"),
}

REFUSED_STREAM_OPTIONS: Refused = {
    "include_obfuscation": Refusal("chunks are not padded", (False,)),
}

REFUSED_IN_MESSAGES: Refused = {
    "audio": Refusal(_NO_AUDIO),
    "function_call": Refusal("OpenAI replaced it", instead="use tool_calls"),
    "images": Refusal(_ANSWERS, ([],)),
    "prefix": Refusal("the answer is a new turn of the assistant", (False,)),
}

REFUSED_PARTS: Refused = dict.fromkeys(
    ("audio_url", "file", "input_audio", "input_file", "video_url"),
    Refusal("no Persimmon model reads them", instead="send parts of the type 'text' or 'image_url'"),
) | {"image": Refusal("OpenAI has images in parts of another type", instead="send parts of the type 'image_url'")}
"""Types of content parts."""

REFUSED_IMAGES = Refusal("the model reads and writes text only", instead="send parts of the type 'text'")
"""Content parts with images, for a model that reads none."""

IMAGE_PARTS = ("image_url", "input_image")
"""The types of content parts with an image."""

REFUSED_IN_TOOLS: Refused = {"defer_loading": Refusal("the model sees every tool", (False,))}

REFUSED_IN_TOKENIZE: Refused = {
    name: REFUSED_IN_CHAT[name]
    for name in (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "media_io_kwargs",
        "mm_processor_kwargs",
    )
}

REFUSED_IN_POOLING: Refused = {
    "mm_processor_kwargs": REFUSED["mm_processor_kwargs"],
    "padding": Refusal("inputs are not padded", ("do_not_pad",)),
    "priority": Refusal("inputs of embeddings and classification have no such tokens", (0,)),
    "request_id": REFUSED["request_id"],
}
"""Of embeddings and classification."""

REFUSED_IN_EMBEDDINGS: Refused = {
    **REFUSED_IN_POOLING,
    "chat_template": Refusal("the server uses the checkpoint's template", instead="send the text as input"),
    "continue_final_message": Refusal("it is not implemented", (False,), "send the text as input"),
    "embed_dtype": Refusal("base64 embeddings are float32", ("float32",)),
    "endianness": Refusal("base64 embeddings are little-endian", ("native", "little")),
}
