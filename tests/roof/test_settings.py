"""Settings: precedence, sources, unknown keys, bounds."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mixtral_serve import settings
from mixtral_serve.settings import Settings, SettingsError, resolve


def parse(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if name != "config"}


def test_without_any_source_every_value_is_the_default() -> None:
    resolved = resolve({}, {})
    assert resolved.settings == Settings()
    assert set(resolved.sources.values()) == {"default"}


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("port = 1\nthreads = 1\nmax_n = 1\n")
    resolved = resolve(
        parse("--port", "3"), {"MIXTRAL_SERVE_PORT": "2", "MIXTRAL_SERVE_THREADS": "2", "PATH": "/bin"}, file
    )
    assert (resolved.settings.port, resolved.settings.threads, resolved.settings.max_n) == (3, 2, 1)
    assert resolved.sources["port"] == "flag"
    assert resolved.sources["threads"] == "environment"
    assert resolved.sources["max_n"] == f"file {file}"
    assert resolved.sources["block_size"] == "default"


def test_the_table_shows_each_setting_with_its_value_and_source() -> None:
    table = resolve(parse("--served-model-name", "a", "b"), {"MIXTRAL_SERVE_ENABLE_PREFIX_CACHING": "false"}).table()
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert set(lines) == set(settings.field_names())
    assert '["a", "b"]' in lines["served_model_name"]
    assert lines["served_model_name"].endswith("# flag")
    assert "false" in lines["enable_prefix_caching"]
    assert lines["enable_prefix_caching"].endswith("# environment")


def test_the_table_is_toml_that_gives_the_same_settings(tmp_path: Path) -> None:
    resolved = resolve(parse("--port", "80", "--model", "x", "--stall-timeout-s", "1.5"), {})
    file = tmp_path / "again.toml"
    file.write_text(resolved.table())
    assert resolve({}, {}, file).settings == resolved.settings


@pytest.mark.parametrize("text", ["prot = 80", "[server]\nport = 80"])
def test_an_unknown_key_in_the_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"unknown setting '(prot|server)'"):
        resolve({}, {}, file)


def test_an_unknown_variable_is_an_error_that_names_it() -> None:
    with pytest.raises(SettingsError, match="MIXTRAL_SERVE_PROT"):
        resolve({}, {"MIXTRAL_SERVE_PROT": "80"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "-1"),
        ("port", "65536"),
        ("port", "many"),
        ("threads", "0"),
        ("weights", "int3"),
        ("scheduling_policy", "lottery"),
        ("enable_prefix_caching", "perhaps"),
        ("stall_timeout_s", "0"),
        ("stall_timeout_s", "inf"),
        ("shutdown_timeout_s", "-0.1"),
        ("shutdown_timeout_s", "inf"),
        ("shutdown_timeout_s", "nan"),
        ("memory_cap_bytes", "0"),
        ("model", ""),
        ("chat_template", ""),
    ],
)
def test_a_value_out_of_bounds_is_an_error_that_names_setting_value_and_source(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({}, {f"MIXTRAL_SERVE_{name.upper()}": value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "environment" in str(caught.value)


def test_a_file_says_what_it_means_by_its_types(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('port = "80"')
    with pytest.raises(SettingsError, match="port"):
        resolve({}, {}, file)


@pytest.mark.parametrize("content", [None, b"port = ", b"\xff\xfe"])
def test_an_unreadable_file_is_an_error_that_names_it(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "s.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"s\.toml"):
        resolve({}, {}, file)


def test_settings_travel_to_another_process_unchanged() -> None:
    there = resolve(parse("--served-model-name", "a", "--no-enable-prefix-caching"), {}).settings
    assert settings.from_json(settings.to_json(there)) == there


def test_every_setting_has_a_flag_with_its_default_in_the_help() -> None:
    parser = argparse.ArgumentParser(prog="x")
    settings.add_flags(parser)
    text = parser.format_help()
    for name in settings.field_names():
        assert "--" + name.replace("_", "-") in text


@pytest.mark.parametrize("file", ["demo.toml", "mixtral-8x7b.toml"])
def test_the_shipped_configuration_files_are_valid(file: str) -> None:
    resolve({}, {}, Path(__file__).parents[2] / "configs" / file)
