import pytest

from persimmon.server.config import environment_variable, flag, read_settings
from persimmon.server.settings.section import SettingsError
from persimmon.server.settings.speculation import DEFAULT_MAX_GUESSES, SpeculativeConfig


def test_a_flag_wins_over_its_environment_variable_which_wins_over_the_default(monkeypatch):
    assert read_settings({}).port == 8000
    monkeypatch.setenv("PERSIMMON_PORT", "9000")
    assert read_settings({}).port == 9000
    assert read_settings({"port": "9001"}).port == 9001


@pytest.mark.parametrize("value", ["16", "32", "64"])
def test_a_block_size_may_come_from_either(value, monkeypatch):
    assert read_settings({"block_size": value}).block_size == int(value)
    monkeypatch.setenv("PERSIMMON_BLOCK_SIZE", value)
    assert read_settings({}).block_size == int(value)


def test_sizes_are_read_with_their_unit():
    assert read_settings({"kv_cache_memory": "1.5GiB"}).kv_cache_memory == 3 * 2**29
    assert read_settings({"kv_cache_memory": "800MB"}).kv_cache_memory == 800_000_000


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", "65536", "65535"),
        ("dtype", "int8", "'float16'"),
        ("block_size", "17", "16, 32 or 64"),
        ("max_num_seqs", "0", "1"),
        ("gpu_memory_utilization", "1.5", "1"),
        ("seed", "-1", "0"),
        ("kv_cache_memory", "lots", "800MB"),
        ("max_body_size", "5 parsecs", "4GiB"),
        ("port", "http", "an integer"),
        ("read_timeout", "soon", "a number"),
        ("access_log", "perhaps", "true or false"),
        ("limit_mm_per_prompt", "4", '{"image": 4}'),
        ("limit_mm_per_prompt", "{'image': 4}", 'expected JSON, for example {"image": 4}'),
        ("limit_mm_per_prompt", '{"video": 1}', "only the key image"),
        ("limit_mm_per_prompt", '{"image": -1}', "from 0 on"),
    ],
)
def test_an_invalid_value_is_reported_with_flag_variable_and_what_is_allowed(name, value, allowed):
    with pytest.raises(SettingsError) as raised:
        read_settings({name: value})
    message = str(raised.value)
    for text in (flag(name), environment_variable(name), f"is {value}: ", allowed):
        assert text in message
    assert "\n" not in message


def test_a_token_budget_below_the_number_of_sequences_is_refused():
    with pytest.raises(SettingsError, match="--max-num-batched-tokens is 8 but --max-num-seqs is 16"):
        read_settings({"max_num_batched_tokens": "8", "max_num_seqs": "16"})


@pytest.mark.parametrize(
    ("given", "sequences", "tokens"),
    [
        ({}, 256, 2048),
        ({"max_num_batched_tokens": "96"}, 96, 96),
        ({"max_num_batched_tokens": "4096"}, 256, 4096),
        ({"max_num_seqs": "4096"}, 4096, 4096),
        ({"max_num_seqs": "8"}, 8, 2048),
        ({"max_num_seqs": "8", "max_num_batched_tokens": "96"}, 8, 96),
    ],
)
def test_a_default_follows_the_setting_that_bounds_it(given, sequences, tokens, monkeypatch):
    settings = read_settings(given)
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (sequences, tokens)
    for name, value in given.items():
        monkeypatch.setenv(environment_variable(name), value)
    assert read_settings({}) == settings


def test_graph_sizes_are_numbers_between_commas(monkeypatch):
    assert read_settings({}).cuda_graph_sizes is None
    assert read_settings({"cuda_graph_sizes": "1,2, 64"}).cuda_graph_sizes == (1, 2, 64)
    monkeypatch.setenv("PERSIMMON_CUDA_GRAPH_SIZES", "8,16")
    assert read_settings({}).cuda_graph_sizes == (8, 16)


def test_a_graph_may_be_for_one_sequence_or_for_all():
    assert read_settings({"cuda_graph_sizes": "1,256"}).cuda_graph_sizes == (1, 256)


@pytest.mark.parametrize(("sizes", "shown"), [("0,4", "0,4"), ("4,257", "4,257"), ("", "empty")])
def test_graph_sizes_outside_the_number_of_sequences_are_refused(sizes, shown):
    with pytest.raises(
        SettingsError, match=f"--cuda-graph-sizes is {shown}: .* from 1 to --max-num-seqs, which is 256"
    ):
        read_settings({"cuda_graph_sizes": sizes})
    read_settings({"cuda_graph_sizes": sizes, "enforce_eager": "true"})  # which leaves all of them out


def test_a_graph_size_that_is_no_number_is_refused():
    with pytest.raises(SettingsError, match=r"--cuda-graph-sizes .* is many"):
        read_settings({"cuda_graph_sizes": "1,many"})


def test_guesses_are_configured_in_vllms_spelling(monkeypatch):
    assert read_settings({}).speculative_config is None
    asked = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
    config = read_settings({"speculative_config": asked}).speculative_config
    assert config is not None
    assert (config.method, config.num_speculative_tokens, config.lookup) == ("ngram", 5, (2, 4))
    monkeypatch.setenv("PERSIMMON_SPECULATIVE_CONFIG", '{"method": "suffix", "num_speculative_tokens": 8}')
    assert read_settings({}).speculative_config == SpeculativeConfig.from_json(
        '{"num_speculative_tokens": 8, "method": "suffix"}'
    )


def test_how_many_guesses_pay_may_be_left_to_the_server():
    config = read_settings({"speculative_config": '{"method": "auto"}'}).speculative_config
    assert config is not None
    assert config.max_guesses == DEFAULT_MAX_GUESSES
    assert read_settings({"speculative_config": "auto"}).speculative_config == config


@pytest.mark.parametrize(
    ("given", "lookup"), [("", (5, 5)), (', "prompt_lookup_max": 4', (4, 4)), (', "prompt_lookup_min": 2', (2, 2))]
)
def test_an_n_that_is_not_given_is_vllms(given, lookup):
    asked = f'{{"method": "ngram", "num_speculative_tokens": 5{given}}}'
    config = read_settings({"speculative_config": asked}).speculative_config
    assert config is not None
    assert config.lookup == lookup


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ("ngram", "expected auto, off or JSON, for example {"),
        ("[5]", "expected an object"),
        ('{"method": "ngram"}', "num_speculative_tokens is missing"),
        ('{"method": "eagle", "num_speculative_tokens": 5}', "method is \"eagle\"; expected 'ngram', 'suffix', "),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "num_speculative_tokens is 0; expected greater than or"),
        ('{"method": "ngram", "num_speculative_tokens": "5"}', 'num_speculative_tokens is "5"; expected integer'),
        (
            '{"method": "ngram", "num_speculative_tokens": 5, "model": "m"}',
            "model is not supported; allowed are method",
        ),
        (
            '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 3}',
            "prompt_lookup_min is 3, more than prompt_lookup_max, which is 2",
        ),
        (
            '{"method": "suffix", "num_speculative_tokens": 5, "prompt_lookup_max": 2}',
            "prompt_lookup_max is only allowed if method is ngram",
        ),
    ],
)
def test_guesses_that_cannot_be_made_are_refused(asked, refusal):
    with pytest.raises(SettingsError) as error:
        read_settings({"speculative_config": asked})
    assert str(error.value).startswith("--speculative-config (or PERSIMMON_SPECULATIVE_CONFIG) is ")
    assert f": {refusal}" in str(error.value)
    assert "\n" not in str(error.value)


def test_add_bos_follows_the_checkpoint_by_default():
    assert read_settings({}).add_bos_token is None
    assert read_settings({"add_bos": "true"}).add_bos_token is True
    assert read_settings({"add_bos": "false"}).add_bos_token is False


@pytest.mark.parametrize("allowed", ["127.0.0.1", "10.0.0.0/8, ::1", "*", ""])
def test_proxies_are_addresses_or_networks(allowed: str) -> None:
    assert read_settings({"forwarded_allow_ips": allowed}).forwarded_allow_ips == allowed


@pytest.mark.parametrize("allowed", ["proxy", "10.0.0.5/8", "127.0.0.1,*"])
def test_what_is_not_a_proxys_address_is_refused(allowed: str) -> None:
    with pytest.raises(SettingsError, match=r"--forwarded-allow-ips .*give addresses or networks like 10\.0\.0\.0/8"):
        read_settings({"forwarded_allow_ips": allowed})


def test_an_embedding_in_a_file_needs_one():
    with pytest.raises(SettingsError, match=r"--embedding-table is file, but --load-format dummy reads no file"):
        read_settings({"embedding_table": "file", "load_format": "dummy"})


def test_limits_on_media_are_vllms_json():
    limits = read_settings({"limit_mm_per_prompt": '{"image": 4}'}).limit_mm_per_prompt
    assert limits is not None
    assert limits.image == 4
    assert read_settings({}).limit_mm_per_prompt is None


def test_media_domains_are_host_names(monkeypatch):
    given = {"allowed_media_domains": ["Images.Example.com", "cdn.example.com"]}
    assert read_settings(given).allowed_media_domains == ("images.example.com", "cdn.example.com")
    monkeypatch.setenv("PERSIMMON_ALLOWED_MEDIA_DOMAINS", "a.test, b.test")
    assert read_settings({}).allowed_media_domains == ("a.test", "b.test")
    for wrong in ("https://a.test", "*.a.test", "a.test:80", "a b"):
        with pytest.raises(SettingsError, match="is not a host name"):
            read_settings({"allowed_media_domains": [wrong]})
