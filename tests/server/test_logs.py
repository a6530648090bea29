import json
import logging
from collections.abc import Iterator

import pytest

from persimmon.server import logs

logger = logging.getLogger("persimmon.logs")
library = logging.getLogger("library")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The root logger as the test runner has it, and the console as it is before anything is configured."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logs.configure("tests")
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("persimmon").setLevel(logging.NOTSET)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_for_people_has_its_fields_behind_its_message(capsys):
    logs.configure("api worker")
    logger.warning("it is %s", "late", extra=logs.with_fields(status=200, path="/a b", key=None, ttft=0.5))
    (line,) = lines(capsys)
    assert line.endswith(' WARNING api worker: it is late status=200 path="/a b" ttft=0.5')


def test_what_is_said_to_people_has_no_time_and_no_level(capsys):
    logs.print_line("Serving demo")
    logs.configure("supervisor")
    logs.print_line("100% of it")
    assert lines(capsys) == ["Serving demo", "100% of it"]


def test_every_line_is_a_json_object_where_that_is_asked(capsys):
    logs.configure("engine", "json")
    logs.print_line("Serving demo")
    logger.warning("two\nlines", extra=logs.with_fields(status=200))
    try:
        raise ZeroDivisionError("oh")
    except ZeroDivisionError:
        logger.exception("it failed")
    said, warned, failed = map(json.loads, lines(capsys))
    assert (said["message"], said["level"], said["process"]) == ("Serving demo", "INFO", "engine")
    assert (warned["message"], warned["level"], warned["status"]) == ("two\nlines", "WARNING", 200)
    assert warned["time"].endswith("Z")
    assert "ZeroDivisionError: oh" in failed["exception"]


def test_a_field_cannot_take_the_place_of_what_says_who_wrote_the_line(capsys):
    logs.configure("engine", "json")
    logger.warning("true", extra=logs.with_fields(message="false", process="other"))
    (line,) = map(json.loads, lines(capsys))
    assert (line["message"], line["process"]) == ("true", "engine")


@pytest.mark.parametrize(
    ("level", "own", "others"),
    [
        ("debug", ["DEBUG", "INFO", "WARNING", "ERROR"], ["WARNING", "ERROR"]),
        ("info", ["INFO", "WARNING", "ERROR"], ["WARNING", "ERROR"]),
        ("warning", ["WARNING", "ERROR"], ["WARNING", "ERROR"]),
        ("error", ["ERROR"], ["ERROR"]),
    ],
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_is_less_than_the_level_is_not_written_and_of_libraries_nothing_less_than_a_warning(
    capsys, level: logs.LogLevel, own: list[str], others: list[str], log_format: logs.LogFormat
):
    logs.configure("engine", log_format, level)
    logs.print_line("is always written")
    for each in (logger, library):
        each.debug("DEBUG from %s", each.name)
        each.info("INFO from %s", each.name)
        each.warning("WARNING from %s", each.name)
        each.error("ERROR from %s", each.name)
    written = lines(capsys)
    assert "is always written" in written[0]
    assert len(written) == 1 + len(own) + len(others)
    for line, name in zip(
        written[1:],
        [f"{each} from persimmon.logs" for each in own] + [f"{each} from library" for each in others],
        strict=True,
    ):
        assert name in line


def test_an_error_that_ends_a_process_is_a_line_like_all_others(capsys):
    logs.configure("engine", "json")
    with pytest.raises(SystemExit) as raised, logs.error_logged():
        raise ZeroDivisionError("oh")
    assert raised.value.code == 1
    (line,) = map(json.loads, lines(capsys))
    assert line["level"] == "CRITICAL"
    assert "ZeroDivisionError: oh" in line["exception"]


def test_an_exit_of_its_own_is_no_error(capsys):
    with pytest.raises(SystemExit) as raised, logs.error_logged():
        raise SystemExit(2)
    assert raised.value.code == 2
    assert lines(capsys) == []


def test_lines_that_were_dropped_are_counted_in_a_line_like_all_others():
    logs.configure("engine", "json")
    line = json.loads(logs._dropped_notice(3))
    assert (line["level"], line["process"]) == ("WARNING", "engine")
    assert line["message"].startswith("3 log lines were dropped here")
