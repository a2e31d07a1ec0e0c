"""Settings: the only reader of the environment and of TOML files.

A value comes from the first of these that has it: a flag, a ``MIXTRAL_SERVE_*`` environment variable, the TOML
file, the default. Each value remembers where it came from. An unknown key, in the file or among the variables,
is an error: a setting that is misspelt must not be silently ignored.

Owns names, bounds, defaults and help of every setting. ``compose`` turns them into small configurations; no
other module sees a ``Settings``. Flags have vLLM's names where they mean the same.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from mixtral_serve.kernels.names import KernelChoice
from mixtral_serve.model.shape import Weights
from scheduler.policies import POLICIES

ENVIRONMENT_PREFIX: Final = "MIXTRAL_SERVE_"

Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
PolicyName = Annotated[str, Meta(pattern=f"^({'|'.join(POLICIES)})$")]


class SettingsError(ValueError):
    """A setting is unknown or out of bounds. The message names it, its source and the bound."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, with bounds, default and help."""

    model: Annotated[str, Meta(min_length=1, description="checkpoint directory, or 'demo' for the bundled model")] = (
        "demo"
    )
    served_model_name: Annotated[
        tuple[str, ...], Meta(description="names the model answers to (default: the directory's name)")
    ] = ()
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 picks a free one")] = 11400
    insecure_no_auth: Annotated[
        bool, Meta(description="listen beyond this machine although nobody is asked for a key")
    ] = False
    weights: Annotated[
        Literal["auto", Weights],
        Meta(description="how weights are held in memory; auto: as the checkpoint is packed, fp32 where it is not"),
    ] = "auto"
    kernels: Annotated[
        KernelChoice,
        Meta(description="what computes with int8 and int4 weights; auto: the fastest that this machine has"),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "int8"],
        Meta(description="how keys and values are held; auto: fp32 beside fp32 weights, bf16 beside all others"),
    ] = "auto"
    threads: Annotated[Count, Meta(description="threads of the model, clipped to what this process may use")] = 8
    memory_cap_bytes: Annotated[Count, Meta(description="hard cap on memory, all processes together")] = 90_000_000_000
    kv_cache_memory_bytes: Annotated[
        CountOrZero, Meta(description="most memory for the KV cache; 0 means what the cap leaves")
    ] = 0
    max_model_len: Annotated[
        CountOrZero, Meta(description="most tokens of one request, prompt and output; 0 means the model's own limit")
    ] = 0
    block_size: Annotated[Count, Meta(le=1024, description="tokens per KV block")] = 16
    max_num_seqs: Annotated[Count, Meta(description="most requests that run at once")] = 64
    max_num_batched_tokens: Annotated[Count, Meta(description="most tokens in one step")] = 512
    long_prefill_token_threshold: Annotated[
        CountOrZero, Meta(description="most prompt tokens of one request in one step; 0 means no limit of its own")
    ] = 0
    max_num_queued_reqs: Annotated[Count, Meta(description="most requests that wait; more are refused with 429")] = 1024
    scheduling_policy: Annotated[PolicyName, Meta(description=f"who goes first: {', '.join(POLICIES)}")] = "fcfs"
    enable_prefix_caching: Annotated[bool, Meta(description="share the KV blocks of equal prefixes")] = True
    check_invariants: Annotated[
        bool, Meta(description="check every law of the scheduler after every step (slow; for debugging)")
    ] = False
    stall_timeout_s: Annotated[
        float,
        Meta(ge=1, le=86_400, description="after so many seconds without a finished step /readyz says 503"),
    ] = 120.0
    chat_template: Annotated[
        str,
        Meta(
            min_length=1,
            description="how conversations become prompts: 'mixtral' (its own format), 'checkpoint' (the checkpoint's "
            "template), a template file, or 'auto' (mixtral where the checkpoint's template means that format)",
        ),
    ] = "auto"
    strict_chat: Annotated[
        bool, Meta(description="refuse conversations that the chat format does not allow, instead of mending them")
    ] = False
    unknown_fields: Annotated[
        Literal["error", "warn"], Meta(description="unknown request fields: refuse, or accept with a warning header")
    ] = "error"
    sse_keep_alive_s: Annotated[
        Seconds, Meta(description="a stream is never silent for longer, a comment breaks the silence; 0: it may be")
    ] = 15.0
    max_n: Annotated[Count, Meta(le=128, description="most choices of one request")] = 16
    max_body_bytes: Annotated[Count, Meta(description="largest request body")] = 1_000_000
    shutdown_timeout_s: Annotated[Seconds, Meta(description="how long SIGTERM waits for running requests")] = 30.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="least level logged")] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="log lines for people or for machines")] = "text"

    @property
    def held_weights(self) -> Weights:
        """How weights are held, as far as the settings alone tell: a packed checkpoint decides otherwise."""
        return "fp32" if self.weights == "auto" else self.weights


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """Settings and, for each, where its value came from."""

    settings: Settings
    sources: Mapping[str, str]

    def table(self) -> str:
        """One line per setting: name, value as TOML, source."""
        rows = [(name, _as_toml(getattr(self.settings, name)), self.sources[name]) for name in field_names()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:<{widths[0]}} = {value:<{widths[1]}}  # {source}" for name, value, source in rows)


def field_names() -> tuple[str, ...]:
    """All settings, in the order of their definition."""
    return Settings.__struct_fields__


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` one flag per setting; absent flags stay absent from the namespace."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        flag = "--" + name.replace("_", "-")
        kind, description = _kind(hint), _description(hint)
        default = _as_toml(getattr(Settings(), name))
        text = f"{description} (default: {default})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(
                flag, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        elif get_origin(kind) is tuple:
            parser.add_argument(flag, dest=name, nargs="+", default=argparse.SUPPRESS, metavar="NAME", help=text)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, dest=name, choices=get_args(kind), default=argparse.SUPPRESS, help=text)
        else:
            metavar = {int: "N", float: "SECONDS"}.get(kind, "TEXT")
            parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, metavar=metavar, help=text)


def resolve(
    flags: Mapping[str, object], environment: Mapping[str, str], config_file: Path | None = None
) -> ResolvedSettings:
    """Merge the sources and check every value.

    Raises:
        SettingsError: an unknown key, a value of a wrong type or out of bounds, or an unreadable file.
    """
    values: dict[str, object] = {}
    sources = dict.fromkeys(field_names(), "default")
    layers = [
        (_read_toml(config_file), f"file {config_file}"),
        (_read_environment(environment), "environment"),
        (dict(flags), "flag"),
    ]
    for layer, source in layers:
        for name, value in layer.items():
            if name not in sources:
                raise SettingsError(f"unknown setting {name!r} ({source})")
            _check(name, value, source)
            values[name] = value
            sources[name] = source
    return ResolvedSettings(msgspec.convert(values, Settings, strict=False), sources)


def _check(name: str, value: object, source: str) -> None:
    try:
        # A file says what it means by its types; a flag or a variable can only be text.
        msgspec.convert({name: value}, Settings, strict=source.startswith("file"))
    except msgspec.ValidationError as error:
        reason = str(error).split(" - at ")[0]
        raise SettingsError(f"{name} = {value!r} ({source}): {reason}") from None


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error


def _read_environment(environment: Mapping[str, str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, text in environment.items():
        if key.startswith(ENVIRONMENT_PREFIX):
            name = key.removeprefix(ENVIRONMENT_PREFIX).lower()
            if name not in field_names():
                raise SettingsError(f"unknown setting {key} (environment)")
            values[name] = [part.strip() for part in text.split(",")] if name == "served_model_name" else text
    return values


def _kind(hint: object) -> Any:
    """The type below any number of ``Annotated``."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _description(hint: object) -> str:
    texts = [meta.description for meta in get_args(hint)[1:] if isinstance(meta, Meta) and meta.description]
    assert len(texts) == 1, "every setting is described once"
    return texts[0]


def _as_toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case tuple():
            return "[" + ", ".join(map(_as_toml, value)) + "]"
        case _:
            return str(value)


def from_json(data: str | bytes) -> Settings:
    """Settings that another process resolved."""
    return msgspec.json.decode(data, type=Settings)


def to_json(settings: Settings) -> str:
    """Settings for another process."""
    return msgspec.json.encode(settings).decode()
