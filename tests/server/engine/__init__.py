import pytest

pytest.register_assert_rewrite(
    "tests.server.engine.engine_turns",
    "tests.server.engine.expectations",
    "tests.server.engine.fake_model",
    "tests.server.engine.preemptions",
    "tests.server.engine.simulation",
)
