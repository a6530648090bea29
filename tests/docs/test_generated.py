"""What docs/ says of settings, metrics, fields and files is what the code says."""

import pytest

from tools import docs


@pytest.mark.parametrize("name", docs.GENERATED)
def test_the_page_has_what_the_code_says(name: str) -> None:
    page = (docs.ROOT / "docs" / name).read_text()
    assert page == docs.updated(page, docs.GENERATED[name]()), "run `make docs`"


def test_a_page_keeps_what_is_written_by_hand() -> None:
    page = f"# Title\n\n{docs.BEGIN}\n\nold\n\n{docs.END}\nmore\n"
    assert docs.updated(page, "new") == f"# Title\n\n{docs.BEGIN}\n\nnew\n\n{docs.END}\nmore\n"


@pytest.mark.parametrize(
    "page", ["# Title\n", f"{docs.BEGIN}\n", f"{docs.BEGIN}\n{docs.END}\n{docs.BEGIN}\n{docs.END}\n"]
)
def test_a_page_without_exactly_one_generated_part_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="expected one generated part"):
        docs.updated(page, "new")
