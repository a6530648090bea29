import pytest

pytest.register_assert_rewrite("tests.server.http.generation.tool_calls")
