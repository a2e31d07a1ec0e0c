"""Parameters that are documented elsewhere and not implemented here: each is refused by name, with the reason.

Owns: ``Refused``, the tables of chat and completions, and ``Screen``, which drops nulls and answers refused fields
before a schema looks at the rest.

Rules: ``null`` means absent, for every field. A refused field passes where it asks for what happens anyway
(``best_of: 1``, ``store: false``). Under ``unknown_fields = "warn"`` the operator has asked for clients to be served
whatever else they send: refused fields are dropped like unknown ones, and the answer's warning header names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mixtral_serve.api.errors import InvalidRequest, clean_name

MAX_KEYS: Final = 64
MAX_INNER_KEYS: Final = 32
MAX_ITEMS: Final = 1024
MAX_LOGIT_BIASES: Final = 1024
_COUNTED: Final = frozenset({"prompt", "input", "tokens"})
"""Lists whose schemas bound them themselves, and look at once."""
_LONGER: Final = {"logit_bias": MAX_LOGIT_BIASES}
"""Objects that may have more than ``MAX_KEYS`` keys."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a field is refused, and the values that pass because they ask for what happens anyway."""

    reason: str
    neutral: tuple[object, ...] = ()
    is_field: bool = False
    """A neutral value goes on to the schema, which has a field of this name: the answer tells of it."""


_GUIDED: Final = "the field is called 'structured_outputs' now"
_ONE_BEAM: Final = "there is no beam search"

UNSUPPORTED: Final[Mapping[str, Refused]] = {
    "best_of": Refused("every choice that is computed is returned: ask for more with 'n'", (1,)),
    "guided_choice": Refused(_GUIDED),
    "guided_grammar": Refused(_GUIDED),
    "guided_json": Refused(_GUIDED),
    "guided_regex": Refused(_GUIDED),
    "length_penalty": Refused(_ONE_BEAM, (1,)),
    "logits_processors": Refused("a request brings no code"),
    "logprob_token_ids": Refused("log-probabilities are given of the most likely tokens only"),
    "prompt_embeds": Refused("prompts are text or token ids"),
    "request_id": Refused("the server makes the ids"),
    "spaces_between_special_tokens": Refused("no spaces are left out", (True,)),
    "store": Refused("answers are not stored", (False,)),
    "use_beam_search": Refused(_ONE_BEAM, (False,)),
}
"""By chat and completions."""

CHAT_UNSUPPORTED: Final[Mapping[str, Refused]] = {
    **UNSUPPORTED,
    "add_special_tokens": Refused("the chat template writes them", (False,)),
    "audio": Refused("answers are text"),
    "chat_template": Refused("a request brings no template"),
    "chat_template_kwargs": Refused("the chat template takes no arguments", ({},)),
    "documents": Refused("put documents into the messages", ([],)),
    "echo": Refused("the messages are not repeated", (False,)),
    "function_call": Refused("it is called 'tool_choice' now", ("none", "auto")),
    "functions": Refused("they are called 'tools' now", ([],)),
    "modalities": Refused("answers are text", (["text"],)),
    "moderation": Refused("nothing is moderated"),
    "prediction": Refused("no prediction speeds up this server"),
    "prompt_cache_options": Refused("the cache decides by itself what it keeps", ({"mode": "implicit"},)),
    "prompt_cache_retention": Refused("prefixes are kept as long as there is memory for them", ("in_memory",)),
    "reasoning_effort": Refused("the model does not reason before it answers", ("none",)),
    "service_tier": Refused("there is one tier, and the answer says 'default'", ("auto", "default"), is_field=True),
    "verbosity": Refused("ask for it in the messages", ("medium",)),
    "web_search_options": Refused("the server opens no address"),
}

COMPLETION_UNSUPPORTED: Final[Mapping[str, Refused]] = {
    **UNSUPPORTED,
    "service_tier": Refused("there is one tier", ("auto", "default")),
    "suffix": Refused("the model was not taught to fill in a middle", ("",)),
}

STREAM_UNSUPPORTED: Final[Mapping[str, Refused]] = {
    "include_obfuscation": Refused("chunks are not padded", (False,)),
}
"""Within ``stream_options``."""


class Screen:
    """Drops what a schema need not see. ``dropped`` collects the names where fields may be dropped with a warning."""

    def __init__(self, *, drops: bool = False) -> None:
        """``drops``: refused fields are dropped instead."""
        self._drops = drops
        self.dropped: list[str] = []

    def fields(self, fields: Mapping[str, Any], refused: Mapping[str, Refused], *, path: str = "") -> dict[str, Any]:
        """``fields`` without nulls and without refused fields that ask for nothing.

        Sizes are bounded here, before the schema looks: it would describe each of a hundred thousand faults.

        Raises:
            InvalidRequest: a refused field asks for something, or there is far too much of something.
        """
        most = MAX_INNER_KEYS if path else MAX_KEYS
        if len(fields) > most:
            param = path.rstrip(".") or None
            raise InvalidRequest(f"An object has at most {most} fields.", param=param, code="array_above_max_length")
        kept: dict[str, Any] = {}
        for name, value in fields.items():
            if value is None:
                continue
            param = path + clean_name(name)
            _check_size(param, value)
            rule = refused.get(name)
            if rule is None:
                kept[name] = value
            elif any(_is_same(value, neutral) for neutral in rule.neutral):
                if rule.is_field:
                    kept[name] = value
            elif self._drops:
                self.dropped.append(param)
            else:
                message = f"'{param}' is not supported by this server: {rule.reason}."
                raise InvalidRequest(message, param=param, code="unsupported_parameter")
        return kept

    def within(self, value: object, path: str, *, levels: int) -> Any:
        """``value`` of the field ``path`` with its objects screened, ``levels`` of them deep; lists do not count.

        Raises:
            InvalidRequest: see ``fields``.
        """
        if isinstance(value, dict) and levels:
            kept = self.fields(value, {}, path=path + ".")
            return {
                name: self.within(inner, f"{path}.{clean_name(name)}", levels=levels - 1)
                for name, inner in kept.items()
            }
        if isinstance(value, list) and levels:
            return [
                self.within(item, f"{path}[{index}]", levels=levels) if isinstance(item, dict) else item
                for index, item in enumerate(value)
            ]
        return value

    def request(self, fields: Mapping[str, Any], refused: Mapping[str, Refused]) -> dict[str, Any]:
        """``fields`` of a whole request, its ``stream_options`` included.

        Raises:
            InvalidRequest: see ``fields``.
        """
        kept = self.fields(fields, refused)
        options = kept.get("stream_options")
        if isinstance(options, dict):
            kept["stream_options"] = self.fields(options, STREAM_UNSUPPORTED, path="stream_options.")
        if "response_format" in kept:
            kept["response_format"] = self.within(kept["response_format"], "response_format", levels=2)
        return kept


def _check_size(param: str, value: object) -> None:
    is_too_large = isinstance(value, dict) and len(value) > _LONGER.get(param, MAX_KEYS)
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        is_too_large = param not in _COUNTED
    if is_too_large:
        raise InvalidRequest(f"'{param}' has too many items.", param=param, code="array_above_max_length")


def _is_same(value: object, neutral: object) -> bool:
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
