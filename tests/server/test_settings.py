"""Settings: flags over variables over the file over defaults, every one of them checked, and printed for a file."""

import tomllib
from dataclasses import fields
from inspect import signature

import pytest

from vitrail.runtime import Runtime
from vitrail.runtime.errors import ConfigError
from vitrail.runtime.server.settings import Settings, load_settings

from ..runtime.command_line import vitrail


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "server.toml"

    def write(text):
        path.write_text(text)
        return path

    return write


def test_flags_outweigh_variables_and_these_the_file(file):
    config = file('port = 1\nhost = "0.0.0.0"\nmax-num-seqs = 3\n')
    environ = {"VITRAIL_PORT": "2", "VITRAIL_HOST": "::1", "VITRAIL_API_KEY": "a, b"}
    found = load_settings({"port": 3, "host": None}, config=config, environ=environ)
    assert (found.port, found.host, found.max_num_seqs, found.api_key) == (3, "::1", 3, ("a", "b"))
    assert load_settings({}, environ={}) == Settings()


def test_variables_are_read_by_the_kind_of_their_setting():
    environ = {
        "VITRAIL_ENFORCE_EAGER": "true",
        "VITRAIL_ENABLE_PREFIX_CACHING": "0",
        "VITRAIL_VISION_CACHE_GB": "0.5",
        "VITRAIL_LIMIT_MM_PER_PROMPT": '{"image": 2}',
        "VITRAIL_MAX_MODEL_LEN": "128",
    }
    found = load_settings({}, environ=environ)
    assert (found.enforce_eager, found.enable_prefix_caching, found.vision_cache_gb) == (True, False, 0.5)
    assert (found.limit_mm_per_prompt, found.max_model_len) == ({"image": 2}, 128)
    assert load_settings({}, environ={"VITRAIL_LIMIT_MM_PER_PROMPT": "3"}).limit_mm_per_prompt == {"image": 3}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"port": 70000}, "port"),
        ({"port": True}, "port"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"shutdown_timeout": -1}, "shutdown_timeout"),
        ({"request_timeout": float("nan")}, "request_timeout"),
        ({"api_key": ("",)}, "api_key"),
        ({"log_level": "loud"}, "log_level"),
        ({"allowed_local_media_path": "/no/such/folder"}, "allowed_local_media_path"),
        ({"limit_mm_per_prompt": "many"}, "limit_mm_per_prompt"),
        ({"host": ""}, "host"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(given, named):
    with pytest.raises(ConfigError, match=named):
        Settings(**given)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prot = 1", "prot is not a setting"),
        ("port = 'x'", "port must be"),
        ("port =", "not TOML"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused_with_its_name(file, tmp_path, text, complaint):
    path = tmp_path / "none.toml" if text is None else file(text)
    with pytest.raises(ConfigError, match=complaint) as raised:
        load_settings({}, config=path, environ={})
    assert str(path) in str(raised.value)


def test_a_variable_that_cannot_be_read_is_named():
    with pytest.raises(ConfigError, match="VITRAIL_PORT"):
        load_settings({}, environ={"VITRAIL_PORT": "many"})


def test_what_is_printed_is_a_file_of_the_same_settings(file, tmp_path):
    chosen = Settings(
        port=9, limit_mm_per_prompt={"image": 2}, allowed_media_domains=("a.org", "*.b.org"), dtype="float32"
    )
    assert load_settings({}, config=file(chosen.to_toml()), environ={}) == chosen
    assert set(tomllib.loads(Settings(api_key=("secret",)).to_toml())["api_key"]) == {"***"}


def test_the_command_has_a_flag_for_every_setting_and_prints_them(monkeypatch):
    monkeypatch.setenv("VITRAIL_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("COLUMNS", "300")
    done = vitrail(
        "serve", "nano", "--port", 5, "--tp", 2, "--no-enable-prefix-caching", "--api-key", "k", "--print-config"
    )
    assert done.status == 0
    printed = tomllib.loads(done.out)
    assert (printed["port"], printed["max_num_seqs"], printed["tensor_parallel_size"]) == (5, 7, 2)
    assert (printed["enable_prefix_caching"], printed["api_key"]) == (False, ["***"])
    shown = " ".join(vitrail("serve", "--help").out.split())
    for one in fields(Settings):
        assert one.name == "model" or f"--{one.name.replace('_', '-')}" in shown, one.name


def test_the_command_reads_a_file(file):
    path = file('model = "nano"\nport = 6\nmax_num_seqs = 2\n')
    printed = tomllib.loads(vitrail("serve", "--config", path, "--port", 7, "--print-config").out)
    assert (printed["port"], printed["max_num_seqs"]) == (7, 2)


def test_a_wrong_flag_ends_the_command_in_one_line():
    done = vitrail("serve", "nano", "--max-num-seqs", 0)
    assert (done.status, done.err) == (2, "vitrail: max_num_seqs must be an integer of at least 1, not 0\n")


def test_the_models_own_settings_are_keywords_of_from_pretrained():
    known = signature(Runtime.from_pretrained).parameters
    for name, value in Settings().runtime_options().items():
        assert name in known
        default = known[name].default
        assert value == default or (not value and default is None), name  # no list is as good as an empty one


def test_a_folder_is_called_by_its_last_part(tmp_path):
    (tmp_path / "InternVL").mkdir()
    assert Settings(model=str(tmp_path / "InternVL")).name == "InternVL"
    assert Settings(model="OpenGVLab/InternVL-Chat-V1-5").name == "OpenGVLab/InternVL-Chat-V1-5"
    assert Settings(served_model_name="mine").name == "mine"


def test_loopback_answers_its_own_names_alone():
    assert set(Settings().hosts) == {"localhost", "127.0.0.1", "::1"}
    assert Settings(host="0.0.0.0").hosts == ()
    assert Settings(allowed_hosts=("a.org",)).hosts == ("a.org",)
