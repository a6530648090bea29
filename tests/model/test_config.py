"""PersimmonConfig: both spellings of config.json, its traps, and one clear line for each file that is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persimmon.model.classifier_config import MAX_LABELS
from persimmon.model.config import Architecture, PersimmonConfig, VisionConfig, check_vocabulary
from persimmon.model.errors import CheckpointError
from tests.model.checkpoints import DEMO

# What Adept's public checkpoints say, stale and meaningless keys included.
PUBLIC: dict[str, Any] = {
    "architectures": ["PersimmonForCausalLM"],
    "bos_token_id": 71013,
    "eos_token_id": 71013,
    "hidden_act": "relu2",
    "hidden_dropout": 0.6,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 16384,
    "model_type": "persimmon",
    "num_attention_heads": 64,
    "num_hidden_layers": 36,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 25000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 262144,
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
ABSENT: Any = object()


def read(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> PersimmonConfig:
    """Reads the public config.json with some keys changed, or left out where the value is ABSENT."""
    values = {key: value for key, value in (PUBLIC | changes).items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return PersimmonConfig.from_folder(folder)


def error(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, generation, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_public_checkpoint_is_read(tmp_path: Path) -> None:
    assert read(tmp_path) == PersimmonConfig(
        vocab_size=262144,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=36,
        num_attention_heads=64,
        max_position_embeddings=16384,
        layer_norm_eps=1e-5,
        rope_theta=25000.0,
        partial_rotary_factor=0.5,
        hidden_act="relu2",
        qk_layernorm=True,
        tie_word_embeddings=False,
        bos_token_id=71013,
        eos_token_ids=(71013,),
        dtype="float16",
    )


def test_new_spelling_means_the_same_as_the_old(tmp_path: Path) -> None:
    table = {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}
    new: dict[str, Any] = {"rope_theta": ABSENT, "rope_scaling": ABSENT, "rope_parameters": table}
    assert read(tmp_path, torch_dtype=ABSENT, dtype="float16", **new) == read(tmp_path)


def test_demo_checkpoint_is_read() -> None:
    config = PersimmonConfig.from_folder(DEMO)
    assert (config.head_dim, config.rotary_dim) == (64, 32)
    assert (config.bos_token_id, config.eos_token_ids, config.dtype) == (1, (1,), "float16")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-6},
        {"rope_theta": 500, "rope_scaling": {"type": "default"}},
        {"rope_theta": ABSENT, "rope_scaling": {"rope_type": "default", "rope_theta": 300.0}},
        {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 0.25}},
        {"rope_theta": 500.0, "rope_parameters": {"partial_rotary_factor": 1.0}},
        {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0}},
        {"tie_word_embeddings": True, "qk_layernorm": False},
        {"hidden_act": ABSENT, "layer_norm_eps": ABSENT, "qk_layernorm": ABSENT, "tie_word_embeddings": ABSENT},
    ],
)
def test_numbers_are_those_that_transformers_reads(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import PersimmonConfig as Reference

    ours, theirs = read(tmp_path, **changes), Reference.from_pretrained(tmp_path)
    for field in (*REQUIRED, "layer_norm_eps", "hidden_act", "qk_layernorm", "tie_word_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"]


def test_config_that_transformers_writes_is_read(tmp_path: Path) -> None:
    from transformers import PersimmonConfig as Reference

    rope = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.25}
    # Saved on its own, a configuration has no architectures.
    theirs = Reference(hidden_size=256, num_attention_heads=4, rope_parameters=rope, dtype="bfloat16")
    theirs.save_pretrained(tmp_path)
    ours = PersimmonConfig.from_folder(tmp_path)
    assert (ours.hidden_size, ours.rope_theta, ours.rotary_dim, ours.dtype) == (256, 777.0, 16, "bfloat16")


def test_absent_partial_rotary_factor_is_a_half(tmp_path: Path) -> None:
    assert "partial_rotary_factor" not in PUBLIC
    config = read(tmp_path)
    assert config.partial_rotary_factor == 0.5
    assert (config.head_dim, config.rotary_dim) == (64, 32)


def test_absent_rope_theta_is_that_of_the_public_checkpoints(tmp_path: Path) -> None:
    assert read(tmp_path, rope_theta=ABSENT).rope_theta == 25000.0
    assert read(tmp_path, rope_theta=ABSENT, rope_parameters={"rope_type": "default"}).rope_theta == 25000.0


def test_absent_layer_norm_eps_is_1e_5_whatever_rms_norm_eps_says(tmp_path: Path) -> None:
    assert read(tmp_path, layer_norm_eps=ABSENT, rms_norm_eps=1e-6).layer_norm_eps == 1e-5
    assert read(tmp_path, layer_norm_eps=1e-4, rms_norm_eps=1e-6).layer_norm_eps == 1e-4


def test_keys_of_no_meaning_here_are_ignored(tmp_path: Path) -> None:
    meaningless: dict[str, Any] = {
        "hidden_dropout": 0.6,
        "attention_dropout": 0.3,
        "rms_norm_eps": 1.0,
        "use_cache": False,
    }
    assert read(tmp_path, **meaningless) == read(tmp_path)


@pytest.mark.parametrize("ids", [ABSENT, None, 2])
def test_end_of_text_of_adepts_vocabulary_is_known_without_config_json(tmp_path: Path, ids: Any) -> None:
    config = read(tmp_path, bos_token_id=1 if ids == 2 else ids, eos_token_id=ids)
    assert config.bos_token_id == 71013
    assert config.eos_token_ids == (71013,)


def test_generation_config_corrects_placeholder_ids(tmp_path: Path) -> None:
    config = read(tmp_path, {"bos_token_id": 71013, "eos_token_id": [71013, 9]}, bos_token_id=1, eos_token_id=2)
    assert config.bos_token_id == 71013
    assert config.eos_token_ids == (71013, 9)


def test_other_vocabularies_have_the_ids_their_files_name_and_no_others(tmp_path: Path) -> None:
    assert read(tmp_path, vocab_size=80000, bos_token_id=1, eos_token_id=2).bos_token_id == 1
    assert read(tmp_path, vocab_size=80000, bos_token_id=1, eos_token_id=2).eos_token_ids == (2,)
    assert read(tmp_path, vocab_size=80000, bos_token_id=ABSENT, eos_token_id=ABSENT).bos_token_id is None
    assert read(tmp_path, vocab_size=80000, bos_token_id=ABSENT, eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [
        (71013, 5, (71013, 5)),
        ([7, 5], [5, 3, 7], (7, 5, 3)),
        (None, 71013, (71013,)),
        (ABSENT, [4, 71013], (4, 71013)),
        (6, None, (6,)),
        (6, ABSENT, (6,)),
    ],
)
def test_eos_ids_are_those_of_both_files(
    tmp_path: Path, in_config: Any, in_generation_config: Any, expected: tuple[int, ...]
) -> None:
    generation = {} if in_generation_config is ABSENT else {"eos_token_id": in_generation_config}
    assert read(tmp_path, generation, eos_token_id=in_config).eos_token_ids == expected


def test_stored_dtype_may_be_unsaid(tmp_path: Path) -> None:
    assert read(tmp_path, torch_dtype=ABSENT).dtype is None
    assert read(tmp_path, torch_dtype=None).dtype is None


@pytest.mark.parametrize("key", REQUIRED)
def test_size_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    assert error(tmp_path, **{key: ABSENT}) == f"{tmp_path}/config.json: {key} is missing"


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("value", [0, -3, 2.5, "12", True, [1]])
def test_size_has_to_be_a_positive_integer(tmp_path: Path, key: str, value: Any) -> None:
    assert error(tmp_path, **{key: value}) == f"{tmp_path}/config.json: {key} is {value!r}; expected a positive integer"


@pytest.mark.parametrize("key", ["layer_norm_eps", "rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("value", [0, -0.5, "0.5", False, float("nan"), float("inf")])
def test_number_has_to_be_positive(tmp_path: Path, key: str, value: Any) -> None:
    needed = "expected a positive number"
    assert error(tmp_path, **{key: value}) == f"{tmp_path}/config.json: {key} is {value!r}; {needed}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "model_type 'mistral'"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"architectures": ABSENT, "model_type": ABSENT}, "architectures is None"),
        ({"architectures": "PersimmonForCausalLM"}, "architectures is 'PersimmonForCausalLM'"),
        ({"hidden_size": 4100}, "hidden_size 4100 is not divisible by num_attention_heads 64"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; expected more than 0 and at most 1"),
        ({"partial_rotary_factor": 0.4}, "0.4 of head_dim 64 makes 25 rotary dimensions"),
        ({"partial_rotary_factor": 0.01}, "makes 0 rotary dimensions"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'relu2' is supported"),
        ({"hidden_act": 2}, "hidden_act is 2; expected a string"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'; expected one of float16, bfloat16, float32"),
        ({"qk_layernorm": "yes"}, "qk_layernorm is 'yes'; expected true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0; expected true or false"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling has a 'su' rotary"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters has a 'proportional'"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters.rope_theta is 'big'"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; expected an object"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config.quant_method is None; expected 'compressed-tensors'",
        ),
        ({"quantization_config": []}, "quantization_config is []; expected an object"),
        ({"eos_token_id": 262144}, "eos_token_id is 262144; expected below vocab_size 262144"),
        ({"eos_token_id": [5, 262145]}, "higher ids have no row in the embedding"),
        ({"bos_token_id": 300000}, "bos_token_id is 300000"),
        ({"vocab_size": 4096}, "bos_token_id is 71013; expected below vocab_size 4096"),
        ({"eos_token_id": -1}, "eos_token_id is -1; expected a token id or a list of them"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id or a list of them"),
        ({"eos_token_id": [True]}, "eos_token_id is [True]"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected at most 10,000"),
        ({"vocab_size": 10**30}, "expected at most 2,147,483,647"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648; expected at most"),
        ({"layer_norm_eps": 10**400}, "expected a positive number"),
    ],
)
def test_value_that_cannot_be_served_is_named_with_its_file(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    found = error(tmp_path, **changes)
    assert found.startswith(f"{tmp_path}/config.json: ")
    assert message in found


def test_other_architecture_is_told_what_is_served(tmp_path: Path) -> None:
    assert error(tmp_path, architectures=["LlamaForCausalLM"], model_type="llama") == (
        f"{tmp_path}/config.json: architectures is ['LlamaForCausalLM'] and model_type 'llama'; "
        "this server serves only PersimmonForCausalLM, PersimmonForSequenceClassification, "
        "PersimmonForTokenClassification (model_type 'persimmon') and FuyuForCausalLM (model_type 'fuyu')"
    )


# What the public checkpoint of Fuyu-8B says at the top level.
FUYU: dict[str, Any] = {
    "architectures": ["FuyuForCausalLM"],
    "model_type": "fuyu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 300,
    "num_channels": 3,
    "patch_size": 30,
}
OF_THE_NETWORK = ("hidden_act", "layer_norm_eps", "qk_layernorm", "rope_scaling", "rope_theta", *REQUIRED)


class TestVision:
    def test_fuyu_is_persimmons_network_that_reads_images(self, tmp_path: Path) -> None:
        config = read(tmp_path, **FUYU)
        assert config.vision == VisionConfig(patch_size=30, num_channels=3, image_token_id=71011)
        assert config.vision.patch_numbers == 2700
        # Unlike Persimmon's, its prompts do begin with <s>, which is 1; |ENDOFTEXT| ends them.
        assert (config.bos_token_id, config.eos_token_ids) == (1, (71013,))
        assert replace(config, vision=None, bos_token_id=71013) == read(tmp_path)

    def test_a_text_config_is_the_network(self, tmp_path: Path) -> None:
        flat = read(tmp_path, **FUYU)
        text = {"model_type": "persimmon", **{key: PUBLIC[key] for key in OF_THE_NETWORK}}
        others = dict.fromkeys(OF_THE_NETWORK, ABSENT)
        assert read(tmp_path, **FUYU | others, text_config=text) == flat
        # Transformers reads what it lacks as its defaults, not as what the top level says.
        text = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "qk_layernorm": False}
        config = read(tmp_path, **FUYU, text_config=text)
        assert (config.num_hidden_layers, config.qk_layernorm, config.intermediate_size) == (3, False, 16384)

    def test_is_the_one_that_transformers_writes(self, tmp_path: Path) -> None:
        from transformers import FuyuConfig

        rope = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.25}
        shape = {"vocab_size": 500, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
        written = FuyuConfig(**shape, rope_parameters=rope, patch_size=14, image_token_id=7, qk_layernorm=False)
        written.save_pretrained(tmp_path)
        config = PersimmonConfig.from_folder(tmp_path)
        assert config.vision == VisionConfig(patch_size=14, image_token_id=7)
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (500, 64, 3)
        assert (config.rope_theta, config.partial_rotary_factor, config.qk_layernorm) == (777.0, 0.25, False)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_token_id": 262144}, "image_token_id is 262144; expected a token id below vocab_size 262144"),
            ({"vocab_size": 1000, "eos_token_id": 5}, "image_token_id is 71011; expected a token id below vocab_size"),
            ({"image_token_id": [1, 2]}, "image_token_id is [1, 2]; expected a single token id"),
            ({"num_channels": 1}, "num_channels is 1; only 3 (red, green and blue) is supported"),
            ({"patch_size": 0}, "patch_size is 0; expected a positive integer"),
            ({"patch_size": 10**6}, "patch_size is 1000000; expected at most 4,096"),
            ({"text_config": {"model_type": "llama"}}, "text_config.model_type is 'llama'; expected 'persimmon'"),
            ({"text_config": {"vocab_size": "a"}}, "text_config.vocab_size is 'a'; expected a positive integer"),
            ({"model_type": "persimmon"}, "architectures is ['FuyuForCausalLM'] and model_type 'persimmon'"),
            ({"architectures": ["PersimmonForCausalLM"]}, "and model_type 'fuyu'; this server serves only"),
        ],
    )
    def test_value_that_cannot_be_served_is_named_with_its_file(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        found = error(tmp_path, **FUYU | changes)
        assert found.startswith(f"{tmp_path}/config.json: ")
        assert message in found


class TestArchitecture:
    @pytest.mark.parametrize("architecture", Architecture)
    def test_is_the_one_the_file_names(self, tmp_path: Path, architecture: Architecture) -> None:
        config = read(tmp_path, architectures=[str(architecture)])
        assert config.architecture is architecture
        assert config.generates == (architecture == "PersimmonForCausalLM")

    def test_is_generation_where_the_file_names_none(self, tmp_path: Path) -> None:
        assert read(tmp_path, architectures=ABSENT).architecture is Architecture.CAUSAL_LM

    def test_is_the_first_that_is_served(self, tmp_path: Path) -> None:
        names = ["PersimmonForX", "PersimmonForTokenClassification", "PersimmonForCausalLM"]
        assert read(tmp_path, architectures=names).architecture is Architecture.TOKEN_CLASSIFICATION

    @pytest.mark.parametrize("names", [[], ["PersimmonForQuestionAnswering"], ["PersimmonModel"], [["a"]], {}, 3])
    def test_of_another_kind_is_refused(self, tmp_path: Path, names: Any) -> None:
        assert f"architectures is {names!r} and model_type 'persimmon'; this server serves only" in error(
            tmp_path, architectures=names
        )

    def test_of_a_classifier_needs_labels_and_generation_has_none(self, tmp_path: Path) -> None:
        config = read(tmp_path)
        with pytest.raises(ValueError, match="PersimmonForTokenClassification has 0 labels"):
            replace(config, architecture=Architecture.TOKEN_CLASSIFICATION)
        with pytest.raises(ValueError, match="PersimmonForCausalLM has 1 labels"):
            replace(config, labels=("a",))


CLASSIFIERS = ["PersimmonForSequenceClassification", "PersimmonForTokenClassification"]


@pytest.mark.parametrize("architecture", CLASSIFIERS)
class TestLabels:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"id2label": None},
            {"num_labels": 1},
            {"num_labels": 3},
            {"id2label": {"0": "good"}},
            {"id2label": {"0": "bad", "1": "good", "2": "bad"}},
            {"id2label": {"2": "c", "0": "a", "1": "b"}, "num_labels": 3},
            {"id2label": {str(number): f"{number}²" for number in range(11)}},
        ],
        ids=str,
    )
    def test_are_those_that_transformers_reads(
        self, tmp_path: Path, architecture: str, changes: dict[str, Any]
    ) -> None:
        from transformers import PersimmonConfig as Reference

        ours, theirs = read(tmp_path, architectures=[architecture], **changes), Reference.from_pretrained(tmp_path)
        assert dict(enumerate(ours.labels)) == theirs.id2label
        assert ours.num_labels == theirs.num_labels

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"id2label": {}}, "id2label is {}; expected a name for each number from 0 on, without gaps"),
            ({"id2label": {"1": "a", "2": "b"}}, "expected a name for each number from 0 on, without gaps"),
            ({"id2label": {"0": "a", "2": "b"}}, "expected a name for each number from 0 on, without gaps"),
            ({"id2label": {"0": "a", "one": "b"}}, "expected a name for each number from 0 on, without gaps"),
            ({"id2label": {"0": "a", "1": None}}, "expected a name for each number from 0 on, without gaps"),
            ({"id2label": {"0": "a", "1": 7}}, "id2label.1 is 7; expected a string"),
            ({"id2label": ["a", "b"]}, "id2label is ['a', 'b']; expected an object"),
            (
                {"id2label": {"0": "a"}, "num_labels": 2},
                "num_labels is 2; expected 1, the number of labels in id2label",
            ),
            ({"num_labels": 0}, "num_labels is 0; expected a positive integer"),
            ({"num_labels": "2"}, "num_labels is '2'; expected a positive integer"),
            ({"num_labels": MAX_LABELS + 1}, "num_labels is 1048577; expected at most 1048576"),
            ({"problem_type": "ranking"}, "problem_type is 'ranking'; expected one of regression, single_label_"),
            ({"problem_type": ["regression"]}, "problem_type is ['regression']; expected a string"),
            ({"problem_type": "single_label_classification", "num_labels": 1}, "only one label; expected two or more"),
            ({"token_classification_bias": 1}, "token_classification_bias is 1; expected true or false"),
            ({"pad_token_id": 262144}, "pad_token_id is 262144; expected one token id below vocab_size 262144"),
            ({"pad_token_id": -1}, "pad_token_id is -1; expected a token id"),
            ({"pad_token_id": [1, 2]}, "pad_token_id is [1, 2]; expected one token id"),
        ],
        ids=str,
    )
    def test_that_make_no_sense_are_named_with_the_file(
        self, tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
    ) -> None:
        found = error(tmp_path, architectures=[architecture], **changes)
        assert found.startswith(f"{tmp_path}/config.json: ")
        assert message in found


def test_labels_mean_nothing_where_text_is_generated(tmp_path: Path) -> None:
    meaningless: dict[str, Any] = {
        "id2label": {"7": 7},
        "num_labels": "many",
        "problem_type": "none",
        "pad_token_id": -1,
    }
    assert read(tmp_path, **meaningless) == read(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "bias", "expected"),
    [
        ("PersimmonForSequenceClassification", ABSENT, False),
        ("PersimmonForSequenceClassification", True, False),
        ("PersimmonForTokenClassification", ABSENT, True),
        ("PersimmonForTokenClassification", False, False),
    ],
)
def test_token_classifiers_have_a_bias_unless_the_file_says_otherwise(
    tmp_path: Path, architecture: str, bias: Any, expected: bool
) -> None:
    assert read(tmp_path, architectures=[architecture], token_classification_bias=bias).score_bias is expected


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "expected"),
    [
        (None, 1, "sigmoid"),
        (None, 2, "softmax"),
        ("single_label_classification", 3, "softmax"),
        ("multi_label_classification", 3, "sigmoid"),
        ("multi_label_classification", 1, "sigmoid"),
        ("regression", 1, "none"),
        ("regression", 3, "none"),
    ],
)
def test_scores_are_reported_as_transformers_pipelines_report_them(
    tmp_path: Path, problem_type: str | None, num_labels: int, expected: str
) -> None:
    for architecture, function in zip(CLASSIFIERS, (expected, "softmax"), strict=True):
        config = read(tmp_path, architectures=[architecture], problem_type=problem_type, num_labels=num_labels)
        assert config.score_function == function


@pytest.mark.parametrize(
    ("pad_token_id", "token_ids", "expected"),
    [
        (None, [5, 6, 7], 2),
        (0, [5, 6, 7], 2),
        (0, [5, 0, 7, 0, 0], 2),
        (0, [0, 0, 7], 2),
        (0, [0, 0, 0], 0),
        (None, [0], 0),
    ],
)
def test_pooled_token_is_the_last_that_is_not_padding(
    tmp_path: Path, pad_token_id: int | None, token_ids: list[int], expected: int
) -> None:
    config = read(tmp_path, architectures=CLASSIFIERS[:1], pad_token_id=pad_token_id)
    assert config.pad_token_id == pad_token_id
    assert config.pooled_token(token_ids) == expected


def test_token_id_beyond_the_embedding_is_named_with_the_file_that_has_it(tmp_path: Path) -> None:
    message = error(tmp_path, {"eos_token_id": 262150})
    assert message.startswith(f"{tmp_path}/generation_config.json: eos_token_id is 262150")


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    assert len(error(tmp_path, eos_token_id=["x" * 100_000])) < 500 + len(str(tmp_path))


def test_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        PersimmonConfig.from_folder(tmp_path / "nowhere")


def test_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match=r"model.safetensors is a file; expected the folder"):
        PersimmonConfig.from_folder(file)


def test_folder_without_config_json_is_told_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json; expected a checkpoint in Hugging Face"):
        PersimmonConfig.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"vocab_size": 1,}', "is not valid JSON: "),
        (b"", "is not valid JSON: "),
        (b"\xff\xfe{}", "is not valid JSON: "),
        (b"[1, 2]", "holds a JSON list; expected an object"),
    ],
)
def test_broken_json_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    read(tmp_path, {})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        PersimmonConfig.from_folder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{name} {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("with_config", [True, False])
def test_adapter_is_refused_with_what_to_do(tmp_path: Path, with_config: bool) -> None:
    if with_config:
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "adept/base"}')
    with pytest.raises(CheckpointError) as caught:
        PersimmonConfig.from_folder(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/adapter_config.json: this is a PEFT adapter of 'adept/base'")
    assert "merge_and_unload" in message
    assert ("delete adapter_config.json" in message) == with_config


def test_config_json_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json is a folder; expected a regular file"):
        PersimmonConfig.from_folder(tmp_path)


def test_tokenizer_with_ids_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    config = read(tmp_path)
    check_vocabulary(tmp_path, config, 262144)
    check_vocabulary(tmp_path, config, 4096)
    with pytest.raises(CheckpointError, match=r"tokenizer has 262145 token ids but vocab_size .* is 262144"):
        check_vocabulary(tmp_path, config, 262145)


def test_reading_a_configuration_needs_no_torch() -> None:
    program = "import sys, persimmon.model.config, persimmon.model.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
