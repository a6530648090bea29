from pathlib import Path

import pytest

from persimmon.server.config import Settings, read_settings
from persimmon.server.http.errors import ApiError
from persimmon.server.http.middleware.keys import ApiKey, KeyRing, key_ring, salted
from persimmon.server.settings.section import SettingsError

ALICE, BOB = ApiKey.of("alice", "correct horse".replace(" ", "-")), ApiKey.of("bob", "battery-staple")
RING = KeyRing((ALICE, BOB))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_is_known_by_its_name_whatever_its_place(scheme: str) -> None:
    assert RING.owner(f"{scheme} correct-horse") == ALICE
    assert RING.owner(f"{scheme}  battery-staple ") == BOB


@pytest.mark.parametrize("given", [None, "", "correct-horse", "Basic correct-horse", "Bearer"])
def test_without_a_key_the_error_says_where_it_belongs(given: str | None) -> None:
    with pytest.raises(ApiError, match="Authorization: Bearer KEY") as raised:
        RING.owner(given)
    response = raised.value.response()
    assert (response.status_code, response.headers["www-authenticate"]) == (401, 'Bearer realm="persimmon"')


@pytest.mark.parametrize("given", ["correct", "correct-horse-", "Correct-Horse", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_wrong_key_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(ApiError) as raised:
        RING.owner(f"Bearer {given}")
    assert raised.value.body.error.code == "invalid_api_key"
    assert given not in raised.value.body.error.message


def test_a_key_may_stand_in_a_header_of_its_own() -> None:
    assert RING.owner(None, "correct-horse") == ALICE
    assert RING.owner("Basic of-a-proxy", " correct-horse ") == ALICE
    assert RING.owner("Bearer battery-staple", "correct-horse") == BOB
    with pytest.raises(ApiError, match="not valid for this server"):
        RING.owner(None, "")


def test_without_keys_everybody_is_let_in() -> None:
    assert KeyRing().owner(None) is None
    assert KeyRing().owner("Bearer anything") is None


def test_keys_come_from_flags_and_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = read_settings({"api_key": ["one,two", "three"]})
    assert [key.name for key in key_ring(given).keys] == ["key-1", "key-2", "key-3"]
    assert key_ring(given).owner("Bearer three") == ApiKey.of("key-3", "three")
    monkeypatch.setenv("PERSIMMON_API_KEY", "one, two")
    assert [key.digest for key in key_ring(read_settings({})).keys] == [
        ApiKey.of("", own).digest for own in ("one", "two")
    ]


def test_a_file_of_keys_has_names_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who may ask\n\nalice: correct-horse\nbob@example.org:a:b:c\n")
    ring = key_ring(Settings(api_key_file=path))
    assert ring.keys == (ALICE, ApiKey.of("bob@example.org", "a:b:c"))


def test_a_key_may_have_an_urgency_and_a_share_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:a max-priority=10 share=4\nbob:b  share=2\ncarol:c max-priority=0\ndave:share=3\n")
    found = {key.name: (key.max_priority, key.share) for key in key_ring(Settings(api_key_file=path)).keys}
    assert found == {"alice": (10, 4), "bob": (None, 2), "carol": (0, 1), "dave": (None, 1)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("secret-1", "line 1: expected name:key"),
        ("# a comment\nal ice:secret-1", "line 2: expected name:key"),
        ("alice:", "line 1: a key must be printable ASCII"),
        ("alice:sec ret-1", "line 1: a key must be printable ASCII"),
        ("alice:secret-1 share=0", "line 1: .* share=N .from 1 to 1000"),
        ("alice:secret-1 share=2 share=2", "line 1: .* each once"),
        ("alice:secret-1 max-priority=-5", "line 1: .* max-priority=N"),
        ("alice:secret-1 max-priority", "line 1: .* max-priority=N"),
        ("alice: share=2 secret-1", "line 1: a key must be printable ASCII"),
        ("", "has no key"),
        ("alice:secret-1\nbob:secret-1", "the same key twice"),
        ("alice:secret-1\nalice:secret-2", "the same name twice"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_without_telling_a_key(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(SettingsError, match=reason) as raised:
        key_ring(Settings(api_key_file=path))
    assert "secret" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="keys cannot be read: No such file"):
        key_ring(Settings(api_key_file=tmp_path / "keys"))


@pytest.mark.parametrize("given", ["", "one,,two", "two words"])
def test_an_empty_key_is_refused(given: str) -> None:
    with pytest.raises(SettingsError, match="a key must be printable ASCII without spaces, and not empty"):
        key_ring(read_settings({"api_key": [given]}))


def test_no_text_made_of_settings_or_keys_shows_a_key() -> None:
    settings = read_settings({"api_key": ["correct-horse"]})
    for shown in (repr(settings), str(settings), repr(key_ring(settings)), settings.model_dump_json()):
        assert "correct" not in shown


def test_salts_differ_by_key_and_by_request_and_never_look_like_a_blocks_hash() -> None:
    salts = [salted(own, asked) for own in (b"", ALICE.cache_salt, BOB.cache_salt) for asked in (None, "a", "b")]
    assert salts[0] == b""
    assert len(set(salts)) == len(salts)
    assert salted(ALICE.cache_salt, "a") == salted(ALICE.cache_salt, "a")
    assert all(len(salt) != 32 for salt in salts)


def test_a_value_that_can_be_no_key_is_not_repeated() -> None:
    with pytest.raises(SettingsError, match="PERSIMMON_API_KEY") as raised:
        read_settings({"api_key": 271828})
    assert "271828" not in str(raised.value)
