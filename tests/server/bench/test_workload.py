import itertools
import json
from pathlib import Path

import pytest

from persimmon.server.bench.workload import (
    CHAT,
    COMPLETIONS,
    WORDS,
    FileWorkload,
    Prompt,
    RandomWorkload,
    WorkloadError,
    request,
)


def first(workload: RandomWorkload | FileWorkload, count: int = 50, seed: str = "0") -> list[Prompt]:
    return list(itertools.islice(workload.prompts(seed), count))


def test_prompts_and_answers_have_the_lengths_asked_for() -> None:
    fixed = first(RandomWorkload(input_len=(7, 7), output_len=(9, 9)))
    assert {(len(prompt.value), prompt.max_tokens) for prompt in fixed} == {(7, 9)}
    mixed = first(RandomWorkload(input_len=(2, 4), output_len=(5, 6)))
    assert {len(prompt.value) for prompt in mixed} == {2, 3, 4}
    assert {prompt.max_tokens for prompt in mixed} == {5, 6}


def test_prompts_repeat_with_the_seed_and_with_no_other() -> None:
    workload = RandomWorkload()
    assert first(workload, seed="1") == first(workload, seed="1")
    assert not {str(each.value) for each in first(workload)} & {str(each.value) for each in first(workload, seed="1")}


def test_a_shared_beginning_is_shared_and_what_follows_is_not() -> None:
    prompts = first(RandomWorkload(input_len=(8, 8), prefix_len=16, prefixes=3))
    assert len({tuple(prompt.value[:16]) for prompt in prompts}) == 3
    assert len({tuple(prompt.value[16:]) for prompt in prompts}) == len(prompts)


def test_warm_up_prompts_share_no_beginning_with_measured_ones() -> None:
    workload = RandomWorkload(prefix_len=16)
    measured = {tuple(prompt.value[:16]) for prompt in first(workload)}
    warm = {tuple(prompt.value[:16]) for prompt in itertools.islice(workload.warm_up_prompts("0"), 50)}
    assert measured.isdisjoint(warm)


def test_words_stand_in_for_token_ids() -> None:
    (text,) = first(RandomWorkload(input_len=(5, 5), prefix_len=2, form="text"), count=1)
    assert (text.field, len(text.value.split())) == ("prompt", 7)
    assert set(text.value.split()) <= set(WORDS)
    (chat,) = first(RandomWorkload(input_len=(5, 5), form="chat"), count=1)
    assert chat.field == "messages"
    assert [message["role"] for message in chat.value] == ["user"]


def test_requests_are_streamed_greedy_and_ask_for_usage() -> None:
    sent = request("name", Prompt("prompt", [1, 2], 3), ignore_eos=True)
    assert (sent.path, sent.expected_tokens) == (COMPLETIONS, 3)
    assert json.loads(sent.body) == {
        "model": "name",
        "prompt": [1, 2],
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    chat = request("name", Prompt("messages", [{"role": "user", "content": "a"}], 3), ignore_eos=False)
    assert (chat.path, chat.expected_tokens) == (CHAT, None)
    assert "ignore_eos" not in json.loads(chat.body)


def test_a_file_has_prompts_and_conversations_and_starts_again_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "b\u2028c"}]
    rows = [{"prompt": "a", "id": 7}, {"messages": messages, "max_tokens": 5}, {"prompt": [1, 2]}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    workload = FileWorkload.read(path, output_len=9, endpoint=None)
    lines = [Prompt("prompt", "a", 9), Prompt("messages", messages, 5), Prompt("prompt", [1, 2], 9)]
    assert first(workload, count=4) == [*lines, lines[0]]
    assert next(workload.warm_up_prompts(0)).value not in [line.value for line in lines]


def test_a_text_becomes_a_message_for_chat(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    (line,) = FileWorkload.read(path, output_len=9, endpoint="chat").lines
    assert line == Prompt("messages", [{"role": "user", "content": "a"}], 9)


@pytest.mark.parametrize(
    ("row", "endpoint", "reason"),
    [
        ("{", None, "not valid JSON"),
        ("[" * 100_000, None, "nested too deeply"),
        ("[]", None, 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', None, 'either "prompt" or "messages"'),
        ('{"prompt": 3}', None, "expected a string or a list of token ids"),
        ('{"prompt": []}', None, "expected a string or a list of token ids"),
        ('{"messages": []}', None, "expected a list of messages"),
        ('{"prompt": "a", "max_tokens": true}', None, "at least 1"),
        ('{"prompt": [1]}', "chat", "token ids cannot"),
        ('{"messages": [{}]}', "completions", "cannot be sent to --endpoint completions"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused(tmp_path: Path, row: str, endpoint: str | None, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{row}\n' if endpoint is None else row)
    with pytest.raises(WorkloadError, match=reason):
        FileWorkload.read(path, output_len=9, endpoint=endpoint)


def test_an_error_in_a_file_says_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{}\n')
    with pytest.raises(WorkloadError, match=r"prompts\.jsonl:3: "):
        FileWorkload.read(path, output_len=9, endpoint=None)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff"])
def test_a_file_that_cannot_be_read_or_is_empty_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkloadError, match=r"cannot be read|has no lines"):
        FileWorkload.read(path, output_len=9, endpoint=None)
