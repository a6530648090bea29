import pytest

from persimmon.server.bench.answer import RequestFailedError, error_message, read_answer
from tests.server.bench.fake_server import chat_chunk, response, sse, text_chunk, usage_chunk


def test_chunks_without_text_are_no_arrivals() -> None:
    answer = read_answer(response(sse(text_chunk(""), text_chunk("a"), usage_chunk(4), "[DONE]")), 4)
    assert len(answer.arrivals) == 1
    assert answer.time_to_first_token == 1.0


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"error": "no"}', 400, "HTTP 400"),
        (sse(text_chunk("a"), {"error": {"message": "died"}}), 200, "died"),
        (sse(text_chunk("a"), "[DONE]"), 200, "no usage"),
        (sse(text_chunk("a"), usage_chunk(4)), 200, r"without \[DONE\]"),
        (sse(text_chunk("a"), usage_chunk(3), "[DONE]"), 200, "3 tokens instead of the requested 4"),
        (sse(usage_chunk(4), "[DONE]"), 200, "no text"),
        (b"data: <html>\n\n", 200, "not a stream of OpenAI's chunks"),
        (sse({"choices": [{}]}, "[DONE]"), 200, "not a stream of OpenAI's chunks"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(body: bytes, status: int, reason: str) -> None:
    with pytest.raises(RequestFailedError, match=reason):
        read_answer(response(body, status), expected_tokens=4)


def test_an_answer_that_the_model_may_end_has_any_number_of_tokens_and_perhaps_no_text() -> None:
    answer = read_answer(response(sse(usage_chunk(1), "[DONE]")), expected_tokens=None)
    assert answer.completion_tokens == 1
    assert answer.time_to_first_token is None
    assert answer.gaps == []


def test_a_chat_message_is_its_reasoning_and_its_content() -> None:
    thought = {"choices": [{"delta": {"role": "assistant", "content": None, "reasoning_content": "hm"}}]}
    answer = read_answer(response(sse(thought, chat_chunk("yes"), usage_chunk(2), "[DONE]")), expected_tokens=2)
    assert answer.text == "hmyes"
    assert len(answer.arrivals) == 2


def test_failures_of_one_cause_are_of_one_kind_whatever_they_say() -> None:
    bodies = [b'{"error": {"message": "request 1:\\n busy"}}', b"<h1>request 2</h1>"]
    failures = []
    for body in bodies:
        with pytest.raises(RequestFailedError) as failure:
            read_answer(response(body, 503), expected_tokens=4)
        failures.append(failure.value)
    assert {failure.kind for failure in failures} == {"HTTP 503"}
    assert [failure.detail for failure in failures] == ["request 1: busy", "<h1>request 2</h1>"]


def test_the_quoted_part_of_an_error_is_short() -> None:
    assert len(error_message(b"x" * 100_000)) <= 300
