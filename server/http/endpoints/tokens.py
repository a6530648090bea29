"""POST /tokenize and /detokenize: text to token ids and back, as the completion endpoints do it.

No generation and no engine: both answer while the model still loads.
"""

from functools import partial

from msgspec import UNSET

from persimmon.model.chat_prompt import ChatPrompt
from persimmon.server.http.endpoints.endpoint import Call
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.generation.conversation import chat_prompt
from persimmon.server.http.schemas.tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens
from persimmon.server.http.transport.json_response import JsonResponse


async def tokenize(service: Service, call: Call[TokenizeRequest]) -> JsonResponse[Tokens]:
    """The token ids of a text or of a conversation.

    Generation would begin with them.
    """
    request = call.request
    service.check_model(request.model)
    prompt: str | ChatPrompt
    if request.prompt is None:
        images = await service.load_images(request.messages, call.receive)
        prompt = await chat_prompt(service.chat, request.messages, request.tools, request.chat_template_kwargs, images)
    else:
        prompt = request.prompt
    add_bos = None if request.add_special_tokens or request.prompt is None else False
    field = "messages" if request.prompt is None else "prompt"
    (token_ids,) = await service.encoder.encode([field], [prompt], add_bos)
    info = service.engine.info
    answer = Tokens(
        count=len(token_ids),
        max_model_len=None if info is None else info.max_model_len,
        tokens=token_ids,
        token_strs=service.tokenizer.pieces(token_ids) if request.return_token_strs else UNSET,
    )
    return JsonResponse(answer)


async def detokenize(service: Service, call: Call[DetokenizeRequest]) -> JsonResponse[Text]:
    """The text of token ids."""
    request = call.request
    service.check_model(request.model)
    text = await service.encoder.decode(request.tokens, partial(service.check_token_ids, "tokens"))
    return JsonResponse(Text(text))
