"""What pages say of settings, metrics, fields, files and examples is what the code says."""

import re

import pytest

from persimmon.server.config import Settings, flag
from tools import docs


def test_pages_have_what_the_code_says() -> None:
    outdated = [path.name for path, page in docs.pages().items() if path.read_text() != page]
    assert outdated == [], "run `make docs`"


def test_every_setting_is_in_the_reference() -> None:
    page = docs.settings_tables()
    assert [name for name in Settings.model_fields if len(re.findall(rf"^\| `{flag(name)}[ `]", page, re.M)) != 1] == []


def test_a_page_keeps_what_is_written_by_hand() -> None:
    page = f"# Title\n\n{docs.BEGIN}\n\nold\n\n{docs.END}\nmore\n"
    assert docs.updated(page, "new") == f"# Title\n\n{docs.BEGIN}\n\nnew\n\n{docs.END}\nmore\n"


@pytest.mark.parametrize(
    "page", ["# Title\n", f"{docs.BEGIN}\n", f"{docs.BEGIN}\n{docs.END}\n{docs.BEGIN}\n{docs.END}\n"]
)
def test_a_page_without_exactly_one_generated_part_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="expected one generated part"):
        docs.updated(page, "new")


def test_a_block_after_the_name_of_an_example_is_its_file() -> None:
    code = (docs.ROOT / "examples" / "chat.sh").read_text()
    page = "Before\n<!-- examples/chat.sh -->\n```sh\nold\n```\nafter\n"
    assert docs.with_examples(page) == f"Before\n<!-- examples/chat.sh -->\n```sh\n{code}```\nafter\n"
