"""LangChain's classes for OpenAI's API, pointed at the server."""

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

from tests.end_to_end.serving import Server

QUESTION = "What does galaxy mean?"
ANSWER = '"Galaxy" is a noun. It means a splendid assemblage.'


def connection(demo: Server) -> dict[str, Any]:
    return {"base_url": f"{demo.url}/v1", "api_key": "none", "model": demo.name, "max_retries": 0}


@pytest.fixture
def chat(demo: Server) -> ChatOpenAI:
    return ChatOpenAI(**connection(demo), temperature=0)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop for all, because LangChain's models share their connections."""
    with asyncio.Runner() as runner:
        yield runner


def test_invoke(demo: Server, chat: ChatOpenAI) -> None:
    answer = chat.invoke(QUESTION)
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == demo.name
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 5


def test_a_stream_says_the_same_with_its_usage(chat: ChatOpenAI) -> None:
    first, *rest = chat.stream(QUESTION, stream_usage=True)
    for chunk in rest:
        first += chunk
    assert first.content == ANSWER
    assert len(rest) > 5
    assert first.usage_metadata == chat.invoke(QUESTION).usage_metadata


def test_a_batch(chat: ChatOpenAI) -> None:
    answers = chat.batch([QUESTION, "What does robot mean?", QUESTION])
    assert answers[0].content == answers[2].content == ANSWER
    assert str(answers[1].content).startswith('"Robot" is a noun.')


def test_asynchronous_calls(chat: ChatOpenAI, loop: asyncio.Runner) -> None:
    async def streamed() -> str:
        return "".join([str(chunk.content) async for chunk in chat.astream(QUESTION)])

    async def main() -> list[Any]:
        plain, stream, batch = await asyncio.gather(chat.ainvoke(QUESTION), streamed(), chat.abatch([QUESTION] * 2))
        return [plain.content, stream, *(each.content for each in batch)]

    assert loop.run(main()) == [ANSWER] * 4


def test_a_conversation_in_a_chain(chat: ChatOpenAI) -> None:
    template = ChatPromptTemplate.from_messages(
        [("human", "What does {word} mean?"), ("ai", "{answer}"), ("human", "What part of speech is it?")]
    )
    answer = (template | chat).invoke({"word": "galaxy", "answer": ANSWER})
    assert answer.content == '"Galaxy" is a noun.'
    turns = [HumanMessage(QUESTION), AIMessage(ANSWER), HumanMessage("What part of speech is it?")]
    assert chat.invoke(turns).content == answer.content
    assert chat.invoke([SystemMessage("You explain words."), HumanMessage(QUESTION)]).content


def test_parameters_reach_the_server(demo: Server, chat: ChatOpenAI) -> None:
    assert chat.bind(stop=["noun"]).invoke(QUESTION).content == '"Galaxy" is a '
    assert chat.bind(max_tokens=3).invoke(QUESTION).response_metadata["finish_reason"] == "length"
    warm = ChatOpenAI(**connection(demo), temperature=1.5, seed=11, n=2, max_tokens=8, extra_body={"top_k": 500})
    [drawn] = warm.generate([[HumanMessage(QUESTION)]]).generations
    [again] = warm.generate([[HumanMessage(QUESTION)]]).generations
    assert [each.text for each in drawn] == [each.text for each in again]
    assert drawn[0].text != drawn[1].text


def test_log_probabilities(chat: ChatOpenAI) -> None:
    reporting = chat.bind(logprobs=True, top_logprobs=2, max_tokens=4)
    tokens = reporting.invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert len(tokens) == 4
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in tokens)
    first, *rest = reporting.stream(QUESTION)
    for chunk in rest:
        first += chunk
    assert first.response_metadata["logprobs"]["content"] == tokens


class Word(BaseModel):
    """A word of a dictionary."""

    word: Literal["galaxy", "robot"]
    noun: bool
    letters: int = Field(ge=1, le=9)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(
    chat: ChatOpenAI, loop: asyncio.Runner, method: Literal["json_schema", "function_calling"]
) -> None:
    structured = chat.with_structured_output(Word, method=method, strict=True)
    assert isinstance(structured.invoke(QUESTION), Word)
    assert isinstance(loop.run(structured.ainvoke(QUESTION)), Word)


def test_tools(chat: ChatOpenAI) -> None:
    armed = chat.bind_tools([Word], tool_choice="Word", strict=True).bind(max_tokens=60)
    answer = armed.invoke(QUESTION)
    [call] = answer.tool_calls
    assert call["name"] == "Word"
    assert Word(**call["args"])
    first, *rest = armed.stream(QUESTION)
    for chunk in rest:
        first += chunk
    assert [(each["name"], each["args"]) for each in first.tool_calls] == [(call["name"], call["args"])]
    history = [HumanMessage(QUESTION), answer, ToolMessage("a noun", tool_call_id=call["id"]), HumanMessage(QUESTION)]
    assert chat.bind(max_tokens=4).invoke(history).content


def test_a_text_completion(demo: Server) -> None:
    model = OpenAI(**connection(demo), temperature=0, max_tokens=12)
    prompt = f"human: {QUESTION}\n\nadept:"
    text = model.invoke(prompt)
    assert text.startswith(' "Galaxy" is a noun.')
    assert "".join(model.stream(prompt)) == text
    assert model.batch([prompt, prompt]) == [text, text]


def test_embeddings(demo: Server) -> None:
    # With its check of lengths LangChain would send the ids of OpenAI's own tokenizer.
    model = OpenAIEmbeddings(**connection(demo), check_embedding_ctx_length=False)
    first, second = model.embed_documents(["galaxy", "robot"])
    assert len(first) == len(second) == 256
    assert first != second
    assert model.embed_query("galaxy") == pytest.approx(first, abs=1e-5)


def test_errors_are_openais(demo: Server, chat: ChatOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ChatOpenAI(**connection(demo) | {"model": "gpt-4"}).invoke(QUESTION)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048 tokens"):
        chat.invoke("a word " * 3000)


def test_an_image(fuyu: Server, picture: str) -> None:
    chat = ChatOpenAI(**connection(fuyu), temperature=0, max_completion_tokens=6)
    for image in (
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": picture.partition(",")[2]},
    ):
        question = HumanMessage([image, {"type": "text", "text": "What is this?"}])
        plain = chat.invoke([question])
        assert plain.response_metadata["token_usage"]["prompt_tokens_details"]["image_tokens"] == 8
        assert "".join(str(chunk.content) for chunk in chat.stream([question])) == plain.content
