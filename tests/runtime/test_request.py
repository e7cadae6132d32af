"""Sampling settings: what is accepted, what is refused and in which words; and what answers look like."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime.errors import InvalidRequestError, UnsupportedError
from vitrail.runtime.request import (
    ALIASES,
    GENERATION_KEYWORDS,
    Completion,
    GenerationConfig,
    GenerationOutput,
    Metrics,
    SamplingParams,
    Usage,
)

FIELDS = {setting.name for setting in dataclasses.fields(GenerationConfig)}


def test_importing_requests_does_not_import_torch() -> None:
    code = "import sys, vitrail.runtime.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_every_promised_setting_exists() -> None:
    promised = (
        "max_new_tokens min_new_tokens do_sample temperature top_p top_k min_p repetition_penalty presence_penalty "
        "frequency_penalty seed stop stop_token_ids bad_words ignore_eos n logprobs logit_bias response_format "
        "skip_special_tokens include_stop_str_in_output max_tiles total_max_tiles cache_salt"
    )
    assert set(promised.split()) == FIELDS
    assert SamplingParams is GenerationConfig


def test_the_typed_keywords_are_the_fields_and_their_aliases() -> None:
    assert FIELDS | ALIASES.keys() == GENERATION_KEYWORDS
    assert set(ALIASES.values()) <= FIELDS


def test_the_defaults_are_greedy_and_512_tokens() -> None:
    config = GenerationConfig()
    assert config.greedy
    assert config.max_new_tokens == 512
    assert config.n == 1
    assert config.stop == ()
    assert config.skip_special_tokens


@pytest.mark.parametrize(
    ("alias", "value", "field", "stored"),
    [
        ("max_tokens", 5, "max_new_tokens", 5),
        ("min_tokens", 5, "min_new_tokens", 5),
        ("random_seed", 5, "seed", 5),
        ("stop_words", ["a"], "stop", ("a",)),
    ],
)
def test_both_dialects_set_one_field(alias: str, value: Any, field: str, stored: Any) -> None:
    assert getattr(GenerationConfig(**{alias: value}), field) == stored
    assert getattr(GenerationConfig().replace(**{alias: value}), field) == stored
    with pytest.raises(TypeError, match=f"{field} and {alias} are two names of one setting"):
        GenerationConfig(**{field: value, alias: value})


@pytest.mark.parametrize(
    ("unknown", "nearest"), [("temprature", "temperature"), ("max_new_token", "max_new_tokens"), ("topp", "top_p")]
)
def test_an_unknown_keyword_is_a_type_error_that_names_the_nearest(unknown: str, nearest: str) -> None:
    for make in (GenerationConfig, GenerationConfig().replace):
        with pytest.raises(TypeError, match=f"'{unknown}'.*'{nearest}'"):
            make(**{unknown: 1})  # type: ignore[arg-type]


def test_a_misspelt_keyword_of_the_calling_function_is_named_too() -> None:
    with pytest.raises(TypeError, match=r"'imags'.*'images'"):
        GenerationConfig.from_kwargs(None, {"imags": 1}, also_known=["images", "history"])


def test_a_base_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="GenerationConfig, not dict"):
        GenerationConfig.from_kwargs({"temperature": 1}, {})  # type: ignore[arg-type]


NAN, INF = math.nan, math.inf
REFUSED: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 1.0, "5", True, INF],
    "min_new_tokens": [-1, 2.5, False],
    "do_sample": [0, 1, "yes"],
    "temperature": [-0.1, -1, 101, NAN, INF, -INF, "hot", True, 1j, 10**400],
    "top_p": [0, -0.5, 1.1, NAN, INF, True, "0.9"],
    "top_k": [0, -1, 1.5, True, NAN],
    "min_p": [-0.1, 1.1, NAN, False],
    "repetition_penalty": [0, -1, 1000, NAN, INF, True],
    "presence_penalty": [-2.1, 2.1, NAN, INF, True],
    "frequency_penalty": [-2.1, 2.1, NAN, INF, True],
    "seed": [1.5, "1", True, 2**64, 10**5000],
    "stop": ["", [""], [1], 5, b"x", {"a": 1}, ["x" * 257], ["x"] * 65, ["\ud800"], np.array("x")],
    "stop_token_ids": [5, "5", [-1], [1.0], [True], [None], [1] * 257],
    "bad_words": ["", [""], [[1]], 5, ["x"] * 65],
    "ignore_eos": [0, "no"],
    "n": [0, -1, 129, 1.0, True],
    "logprobs": [-1, 21, True, 1.0],
    "logit_bias": [
        [1],
        {-1: 1},
        {1: 101},
        {1: NAN},
        {1: True},
        {"a": 1},
        {"1.5": 1},
        {True: 1},
        dict.fromkeys(range(1025), 1),
    ],
    "response_format": [
        *("text", [], 1, {}, {"type": "xml"}, {"type": "regex"}, {"type": "regex", "regex": 1}),
        *({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}, {"type": "text", "more": 1}),
    ],
    "skip_special_tokens": [1, "yes"],
    "include_stop_str_in_output": [1, "yes"],
    "max_tiles": [0, -1, 257, True, 1.0],
    "total_max_tiles": [0, -1, True, 1.0],
    "cache_salt": ["", "x" * 257, 3, b"tenant"],
}


def test_every_setting_has_refused_values() -> None:
    assert REFUSED.keys() == FIELDS


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_out_of_range_is_refused_in_one_line_that_names_the_field(name: str) -> None:
    for value in REFUSED[name]:
        with pytest.raises(InvalidRequestError) as caught:
            GenerationConfig(**{name: value})
        message = str(caught.value)
        assert message.startswith(name)
        assert "must be" in message
        assert "\n" not in message
        assert len(message) < 300


def test_a_refusal_names_the_value_and_the_range() -> None:
    with pytest.raises(InvalidRequestError, match=r"^temperature=-0.5: must be a number from 0 to 100$"):
        GenerationConfig(temperature=-0.5)
    with pytest.raises(InvalidRequestError, match=r"^top_p=0: must be a number above 0 and up to 1$"):
        GenerationConfig(top_p=0)
    with pytest.raises(InvalidRequestError, match=r"^stop_token_ids\[1\]=-3: must be an integer of at least 0$"):
        GenerationConfig(stop_token_ids=[1, -3])


ACCEPTED: list[tuple[str, Any, Any]] = [
    ("max_new_tokens", 1, 1),
    ("max_new_tokens", np.int64(7), 7),
    ("temperature", 0, 0.0),
    ("temperature", np.float32(0.5), 0.5),
    ("top_p", 1, 1.0),
    ("top_k", 1, 1),
    ("min_p", 0, 0.0),
    ("min_p", 1, 1.0),
    ("presence_penalty", -2, -2.0),
    ("seed", -1, -1),
    ("stop", "END", ("END",)),
    ("stop", ["a", "b"], ("a", "b")),
    ("stop_token_ids", {7}, (7,)),
    ("n", 128, 128),
    ("logprobs", 0, 0),
    ("logit_bias", {"5": -100, 6: 1}, {5: -100.0, 6: 1.0}),
    ("logit_bias", {}, {}),
    ("response_format", {"type": "text"}, {"type": "text"}),
    ("total_max_tiles", 1000, 1000),
    ("cache_salt", "tenant", "tenant"),
]


@pytest.mark.parametrize(("name", "value", "stored"), ACCEPTED)
def test_a_value_in_range_is_stored_in_its_plain_type(name: str, value: Any, stored: Any) -> None:
    result = getattr(GenerationConfig(**{name: value}), name)
    assert result == stored
    assert type(result) is type(stored)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_none_stands_for_the_default(name: str) -> None:
    assert GenerationConfig(**{name: None}) == GenerationConfig()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), values, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=100)
@given(name=st.sampled_from(sorted(GENERATION_KEYWORDS)), value=anything)
def test_any_value_is_either_stored_or_refused_in_one_line(name: str, value: Any) -> None:
    message = ""
    try:
        config = GenerationConfig(**{name: value})
    except (InvalidRequestError, UnsupportedError) as error:
        message = str(error)
    else:
        assert config.replace() == config
    assert "\n" not in message


@pytest.mark.parametrize(
    ("keywords", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0}, 0.0),
        ({"temperature": 0, "top_p": 0.9}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"min_p": 0.1}, 1.0),
        ({"temperature": 0.3, "top_k": 5}, 0.3),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True, "top_p": 0.5}, 1.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0}, 0.0),
        ({"seed": 1, "n": 3}, 0.0),
    ],
)
def test_sampling_happens_exactly_where_it_was_asked_for(keywords: dict[str, Any], temperature: float) -> None:
    config = GenerationConfig(**keywords)
    assert config.greedy is (temperature == 0)
    assert config.sampling_temperature == temperature


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.0}])
def test_do_sample_false_with_sampling_fields_is_an_error(sampling: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"do_sample=False contradicts {next(iter(sampling))}="):
        GenerationConfig(do_sample=False, **sampling)


def test_do_sample_true_at_temperature_zero_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="do_sample=True contradicts temperature=0"):
        GenerationConfig(do_sample=True, temperature=0)


def test_more_minimum_than_maximum_tokens_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="min_new_tokens=6: must be at most max_new_tokens, which is 5"):
        GenerationConfig(max_new_tokens=5, min_new_tokens=6)


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "total", "schema": {"type": "object"}}},
        {"type": "regex", "regex": "[0-9]+"},
    ],
)
def test_the_forms_of_structured_output_are_kept_as_they_are(wanted: dict[str, Any]) -> None:
    assert GenerationConfig(response_format=wanted).response_format == wanted
    with pytest.raises(InvalidRequestError, match="ignore_eos contradicts response_format"):
        GenerationConfig(response_format=wanted, ignore_eos=True)


def test_a_token_id_beyond_the_vocabulary_is_refused_once_the_model_is_known() -> None:
    GenerationConfig(stop_token_ids=[99], logit_bias={99: 1}).check_vocabulary(100)
    with pytest.raises(InvalidRequestError, match=r"stop_token_ids: token id 100 .* vocabulary size 100"):
        GenerationConfig(stop_token_ids=[100]).check_vocabulary(100)
    with pytest.raises(InvalidRequestError, match=r"logit_bias: token id 100 .* vocabulary size 100"):
        GenerationConfig(logit_bias={100: 1}).check_vocabulary(100)


def test_replace_keeps_what_it_is_not_told_to_change() -> None:
    base = GenerationConfig(max_tokens=5, stop=["a"], logit_bias={1: 2}, seed=3)
    changed = base.replace(temperature=0.2, max_tokens=7)
    assert (changed.temperature, changed.max_new_tokens) == (0.2, 7)
    assert (changed.stop, changed.logit_bias, changed.seed) == (("a",), {1: 2.0}, 3)
    assert base.temperature is None
    assert changed.replace(temperature=None).greedy
    assert dataclasses.replace(base, n=2) == base.replace(n=2)
    assert GenerationConfig.from_kwargs(base, {}) == base
    assert GenerationConfig.from_kwargs(None, {"n": 2}) == GenerationConfig(n=2)


def test_a_config_is_a_value() -> None:
    config = GenerationConfig(stop="a", logit_bias={1: 2})
    assert config == GenerationConfig(stop=["a"], logit_bias={"1": 2.0})
    assert hash(config) == hash(GenerationConfig(stop=["a"], logit_bias={"1": 2.0}))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n = 2  # type: ignore[misc]


def output() -> GenerationOutput:
    first = Completion("42", [4, 2], "stop", [[-0.5, (4, -0.5)], [-0.1, (2, -0.1)]])
    usage = Usage(prompt_tokens=300, completion_tokens=3, image_tokens=256, image_tiles=1)
    return GenerationOutput([first, Completion("4", [4], "length")], [1, 7, 9], [1], usage, Metrics(e2e_ms=12.5))


def test_the_top_level_of_an_output_mirrors_its_first_completion() -> None:
    answer = output()
    assert answer.text == "42"
    assert answer.token_ids is answer.outputs[0].token_ids
    assert answer.logprobs is answer.outputs[0].logprobs
    assert answer.finish_reason == "stop"


def test_an_output_survives_json() -> None:
    body = json.loads(json.dumps(output().to_dict()))
    assert body["text"] == body["outputs"][0]["text"] == "42"
    assert body["logprobs"][0] == [-0.5, [4, -0.5]]
    assert body["outputs"][1]["finish_reason"] == "length"
    assert body["usage"] == {
        "prompt_tokens": 300,
        "completion_tokens": 3,
        "image_tokens": 256,
        "image_tiles": 1,
        "cached_tokens": 0,
    }
    assert body["metrics"]["e2e_ms"] == 12.5
    assert body["num_tiles"] == [1]
    assert body["prompt_token_ids"] == [1, 7, 9]
    assert body["error"] is None
