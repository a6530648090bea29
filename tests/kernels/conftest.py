import pytest


@pytest.fixture(scope="package", autouse=True)
def _fast_interpreter() -> None:
    from tests.interpreter import keep_language_patched

    keep_language_patched()
