"""Answers of each format, judged by jsonschema's checkers and by Python's own parsers."""

import datetime
import ipaddress
import json
import random
import re
import uuid
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from persimmon.model.grammar import Matcher
from persimmon.model.grammar.formats import FORMATS, IMPLIED, without_lookaround
from tests.model.grammar_walks import accepts, compile_json, random_answer

CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER


def matcher(name: str) -> Matcher:
    return compile_json(json.dumps({"type": "string", "format": name}))


def answers(name: str, count: int) -> list[str]:
    begin, rng = matcher(name), random.Random(name)
    found = [random_answer(begin.copy(), rng) for _ in range(count)]
    values = [json.loads(answer) for answer in found if answer is not None]
    assert len(values) > count // 2
    return values


@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_of_their_format(name: str) -> None:
    for value in answers(name, 40):
        assert name in CHECKER.checkers or name.startswith("uuid") or name == "ipvanyaddress"
        assert CHECKER.conforms(value, name), value
        for pattern in IMPLIED.get(name, ()):
            assert re.search(pattern, value)


PARSERS: dict[str, Callable[[str], Any]] = {
    "date-time": lambda value: datetime.datetime.fromisoformat(value).utcoffset(),
    "date": datetime.date.fromisoformat,
    "time": lambda value: datetime.time.fromisoformat(value).utcoffset(),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "ipvanyaddress": ipaddress.ip_address,
    "uuid": uuid.UUID,
}


@pytest.mark.parametrize("name", PARSERS)
def test_python_reads_answers_of_a_format(name: str) -> None:
    for value in answers(name, 40):
        assert PARSERS[name](value) is not None


@pytest.mark.parametrize("version", [1, 3, 4, 5, 6, 7, 8])
def test_the_versions_of_uuids_are_those_that_pydantic_asks_for(version: int) -> None:
    for value in answers(f"uuid{version}", 10):
        assert uuid.UUID(value).variant == uuid.RFC_4122
        assert value[14] == str(version)


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        (
            "date",
            ["2024-02-29", "2000-02-29", "2023-02-28", "0001-01-01", "9999-12-31", "2026-11-30", "1996-02-29"],
            [
                *("2026-02-30", "2023-02-29", "1900-02-29", "2100-02-29", "2026-02-31", "2026-04-31", "2026-11-31"),
                *("2026-00-10", "2026-13-01", "2026-01-00", "2026-01-32", "0000-01-01", "2026-1-1", "20260101"),
            ],
        ),
        (
            "time",
            ["00:00:00Z", "23:59:59.123456789Z", "12:30:00+02:00", "12:30:00-00:00", "12:30:00+14:00"],
            [
                *("24:00:00Z", "12:60:00Z", "12:00:60Z", "23:59:60Z", "12:00Z", "12:00:00", "12:00:00.Z"),
                *("12:00:00+24:00", "12:00:00+02:60", "12:00:00z", "12:00:00+0200"),
            ],
        ),
        (
            "date-time",
            ["2024-02-29T12:00:00Z", "1999-12-31T23:59:59.9-08:00"],
            ["2026-02-30T12:00:00Z", "2024-02-29 12:00:00Z", "2024-02-29T12:00:00", "1990-12-31T23:59:60Z"],
        ),
        (
            "duration",
            ["P1Y2M3DT4H5M6S", "P4W", "PT36H", "P1D", "PT1M", "P1YT1S"],
            ["P", "PT", "P1YT", "P1Y1D", "PT1H1S", "P1W1D", "1D", "P1.5D", "-P1D", "P1S"],
        ),
        (
            "email",
            ["ada@example.com", "a.b+c@mail.example.co.uk", "o'neil@x.org"],
            ["a", "@b.c", "a@", "a@b", ".a@b.cd", "a.@b.cd", "a..b@c.de", "a b@c.de", "a@-b.cd", "a@b-.cd", "a@b.c"],
        ),
        (
            "hostname",
            ["localhost", "example.com", "a-b.c-d.example", "3com.example"],
            ["", "-a", "a-", "a..b", ".a", "a.", "a_b", "1.2.3.4", "x" * 64, "xn--a"],
        ),
        ("ipv4", ["0.0.0.0", "255.255.255.255", "10.0.0.1"], ["256.0.0.1", "1.2.3", "01.2.3.4", "1.2.3.4.5"]),
        (
            "ipv6",
            ["::", "::1", "1::", "2001:db8::8a2e:370:7334", "1:2:3:4:5:6:7:8", "::ffff:1.2.3.4", "1:2:3:4:5:6:1.2.3.4"],
            ["", ":", "1", "1:2:3:4:5:6:7", "1::2::3", "12345::", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7::8", "::1.2.3"],
        ),
        ("uuid", ["00000000-0000-0000-0000-000000000007"], ["00000000000000000000000000000007", "g" * 36]),
        (
            "uri",
            [
                "https://example.com",
                "http://a.b:8080/c?d=e#f",
                "urn:isbn:0451450523",
                "mailto:a@b.c",
                "ftp://u@h.de/%20",
            ],
            [
                "example.com",
                "/a",
                "//a",
                "http://",
                "http:// a",
                "http://a/ b",
                "http://a/%2",
                "1a:b",
                "http://a:99999",
            ],
        ),
        ("uri-reference", ["", "/a/b", "a?b", "#c", "../d", "//e/f", "https://example.com/"], [" ", "%", "a b", "\\"]),
        ("uri-template", ["/a/{b}", "{?q,r*}{+s:3}"], ["{", "{}", "{a", "a b", "{a b}"]),
        ("json-pointer", ["", "/", "/a/0/~0~1"], ["a", "/~", "/~2"]),
        ("relative-json-pointer", ["0", "1/a", "2#"], ["", "-1", "01", "/a"]),
    ],
)
def test_a_format_is_what_its_rfc_says_and_readers_take(name: str, valid: list[str], invalid: list[str]) -> None:
    begin = matcher(name)
    assert [text for text in valid if not accepts(begin, json.dumps(text))] == []
    assert [text for text in valid if not CHECKER.conforms(text, name)] == []
    assert [text for text in invalid if accepts(begin, json.dumps(text))] == []


@pytest.mark.parametrize(("name", "pattern"), [(name, pattern) for name in IMPLIED for pattern in IMPLIED[name]])
def test_what_zod_writes_next_to_a_format_is_accepted(name: str, pattern: str) -> None:
    begin = compile_json(json.dumps({"type": "string", "format": name, "pattern": pattern}))
    answer = random_answer(begin, random.Random(1))
    assert answer is None or re.search(pattern, json.loads(answer))


def test_a_format_holds_together_with_a_pattern_and_a_length() -> None:
    schema = {"type": ["string", "null"], "format": "date", "pattern": "-02-", "maxLength": 10}
    begin = compile_json(json.dumps({**schema, "allOf": [{"pattern": "9$"}]}))
    assert accepts(begin, '"2024-02-29"')
    assert accepts(begin, "null")
    assert not accepts(begin, '"2023-02-29"')
    assert not accepts(begin, '"2024-03-29"')
    assert not accepts(begin, '"2024-02-28"')


@pytest.mark.parametrize(
    ("pattern", "valid", "invalid"),
    [
        (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", ["0", "-12.50", "+3."], ["", "-", ".", "1.2.3", "a"]),
        (r"^(?!^[-+.]*$)[+-]?0*\d{0,3}\.?\d{0,2}0*$", ["123.45", "-1"], ["1234567", "1.234", ""]),
        (r"^(?!^[-+.]*$)[+-]?0*\d{0,0}\.?\d{0,2}0*$", ["0.25"], ["1.25"]),
    ],
)
def test_pydantics_pattern_of_decimals_is_followed(pattern: str, valid: list[str], invalid: list[str]) -> None:
    assert without_lookaround(pattern) != pattern
    begin = compile_json(json.dumps({"type": "string", "pattern": pattern}))
    assert [text for text in valid if not (accepts(begin, json.dumps(text)) and re.search(pattern, text))] == []
    assert [text for text in invalid if accepts(begin, json.dumps(text))] == []


@pytest.mark.parametrize("format_", [{}, {"format": "email"}], ids=["pattern", "pattern and format"])
@pytest.mark.parametrize("letters", ["A-Za-z", "a-zA-Z"])
def test_zods_pattern_of_addresses_is_followed(format_: dict[str, str], letters: str) -> None:
    name, last = rf"[{letters}0-9_'+\-\.]", f"[{letters}0-9_+-]"
    pattern = rf"^(?!\.)(?!.*\.\.)({name}*){last}@([{letters}0-9][{letters}0-9\-]*\.)+[{letters}]{{2,}}$"
    begin = compile_json(json.dumps({"type": "string", "pattern": pattern, **format_}))
    for text in ("ada@example.com", "a.b+c_d'e-f@x1.y-z.Org", "a@b.cd"):
        assert re.search(pattern, text)
        assert accepts(begin, json.dumps(text))
    for text in (".a@b.cd", "a..b@c.de", "a.@b.cd", "a'@b.cd", "a!b@c.de", "a@b", "a@b..cd", "a@-b.cd", "a@b.c1"):
        assert not re.search(pattern, text)
        assert not accepts(begin, json.dumps(text))
    answers = [random_answer(begin.copy(), random.Random(seed), 200) for seed in range(20)]
    assert all(re.search(pattern, json.loads(answer)) for answer in answers if answer is not None)
