"""Chat turns are rendered as Persimmon was trained to read them; what the format cannot hold is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from persimmon import model
from persimmon.model.chat_format import STOP, AnswerText, ChatFormatError, Turn, render

TEMPLATE = (Path(model.__file__).parent / "demo" / "chat_template.jinja").read_text()

PLAIN_CONVERSATIONS = [
    [Turn("user", "What does run mean?")],
    [Turn("user", "Hi"), Turn("assistant", "Hello!"), Turn("user", "Bye")],
    [Turn("user", "1"), Turn("assistant", "2"), Turn("user", "3"), Turn("assistant", "4"), Turn("user", "5")],
    [Turn("system", "Be brief."), Turn("user", "Hi")],
    [Turn("system", "Greet the reader.")],
    [
        Turn("system", "Be brief."),
        Turn("system", "Be kind."),
        Turn("user", "Hi"),
        Turn("assistant", "Yes?"),
        Turn("user", "!"),
    ],
    [Turn("user", "  spaces \n\n and\tlines\r\n"), Turn("assistant", " too "), Turn("user", "\n")],
    [Turn("user", ""), Turn("assistant", ""), Turn("user", "")],
    [Turn("user", "{{ not a template }} 日本語 😀 |ENDOFTEXT|")],
]


def test_one_prompt() -> None:
    assert render([Turn("user", "What is a cat?")]) == "human: What is a cat?\n\nadept:"


def test_a_follow_up_repeats_the_conversation() -> None:
    turns = [Turn("user", "a cat?"), Turn("assistant", "an animal"), Turn("user", "which?")]
    assert render(turns) == "human: a cat?\n\nadept: an animal\n\nhuman: which?\n\nadept:"


@pytest.mark.parametrize("turns", PLAIN_CONVERSATIONS)
@pytest.mark.parametrize("transformers_options", [True, False])
def test_plain_conversations_render_as_the_demos_chat_template(turns: list[Turn], transformers_options: bool) -> None:
    environment = Environment(trim_blocks=transformers_options, lstrip_blocks=transformers_options)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = environment.from_string(TEMPLATE).render(
        messages=messages, bos_token="<bos>", add_generation_prompt=True
    )
    assert f"<bos>{render(turns)}" == rendered


def test_a_system_message_alone_is_answered() -> None:
    assert render([Turn("system", "Be brief.")]) == "Be brief.\n\nadept:"


def test_system_messages_come_first_in_their_order_wherever_they_stand() -> None:
    turns = [
        Turn("system", "One."),
        Turn("user", "a"),
        Turn("developer", "Two."),
        Turn("assistant", "b"),
        Turn("user", "c"),
        Turn("system", "Three."),
    ]
    assert render(turns) == "One.\n\nTwo.\n\nThree.\n\nhuman: a\n\nadept: b\n\nhuman: c\n\nadept:"


def test_an_empty_system_message_says_nothing() -> None:
    assert render([Turn("system", ""), Turn("user", "a")]) == render([Turn("user", "a")])


def test_neighbouring_messages_of_one_role_are_one_turn() -> None:
    turns = [
        Turn("user", "a"),
        Turn("user", "b"),
        Turn("assistant", "c"),
        Turn("assistant", "d"),
        Turn("user", "e"),
    ]
    assert render(turns) == "human: a\n\nb\n\nadept: c\n\nd\n\nhuman: e\n\nadept:"
    between = [Turn("user", "a"), Turn("system", "s"), Turn("user", "b")]
    assert render(between) == "s\n\nhuman: a\n\nb\n\nadept:"


def test_what_tools_have_given_is_a_turn_of_the_humans() -> None:
    turns = [Turn("user", "a"), Turn("assistant", "call"), Turn("tool", "1"), Turn("tool", "2")]
    assert render(turns) == "human: a\n\nadept: call\n\nhuman: 1\n\n2\n\nadept:"
    assert render([*turns, Turn("user", "b")]) == "human: a\n\nadept: call\n\nhuman: 1\n\n2\n\nb\n\nadept:"


def test_a_conversation_may_begin_with_the_assistant() -> None:
    turns = [Turn("assistant", "How can I help?"), Turn("user", "a")]
    assert render(turns) == "adept: How can I help?\n\nhuman: a\n\nadept:"


@given(st.lists(st.builds(Turn, st.sampled_from(["system", "developer", "user", "assistant", "tool"]), st.text())))
def test_content_is_rendered_verbatim(turns: list[Turn]) -> None:
    prompt = render([*turns, Turn("user", "end")])
    assert all(turn.content in prompt for turn in turns)
    assert prompt.endswith("end\n\nadept:")


@pytest.mark.parametrize("role", ["function", "User", "human", ""])
def test_other_roles_are_refused_by_name(role: str) -> None:
    with pytest.raises(ChatFormatError) as caught:
        render([Turn("user", "a"), Turn(role, "b"), Turn("user", "c")])
    message = str(caught.value)
    assert f"messages[1] has the role {role!r}" in message
    assert "allowed are system, developer, user, assistant, tool" in message


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([], "there is none"),
        ([Turn("user", "a"), Turn("assistant", "b")], "the last one is from the assistant"),
        (
            [Turn("user", "a"), Turn("assistant", "b"), Turn("system", "s")],
            "the last one is from the assistant",
        ),
    ],
)
def test_a_conversation_that_leaves_the_assistant_nothing_to_answer_is_refused(turns: list[Turn], found: str) -> None:
    with pytest.raises(ChatFormatError, match=f"must end with a user or tool message .* but {found}"):
        render(turns)


def test_the_default_stop_is_where_the_next_turn_begins() -> None:
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    answer_and_rest = render(turns).removeprefix(render(turns[:1]))
    assert answer_and_rest.split(STOP)[0] == " b"


@given(st.lists(st.sampled_from(["", " ", "  ", "a", " a", "\n", "\ufffd"])))
def test_exactly_one_leading_space_is_taken_off_an_answer_however_it_is_split(deltas: list[str]) -> None:
    answer = AnswerText()
    assert "".join(answer.push(delta) for delta in deltas) == "".join(deltas).removeprefix(" ")


def test_an_answer_given_back_renders_to_what_the_model_wrote() -> None:
    prompt, written = render([Turn("user", "a")]), "  two spaces, one of them the format's"
    answer = AnswerText().push(written)
    follow_up = render([Turn("user", "a"), Turn("assistant", answer), Turn("user", "b")])
    assert follow_up.startswith(prompt + written + "\n\nhuman: b")
