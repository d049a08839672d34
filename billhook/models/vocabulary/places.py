"""Where configs and tokenizer files name tokens by id, and the same with other ids."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from billhook.core.results.json_form import JsonObject

Number = Callable[[int], int]  # the new id of a token

_CONFIG = re.compile(r".*_token_ids?|suppress_tokens|begin_suppress_tokens|bad_words_ids|force_words_ids")


def in_config(told: JsonObject, number: Number) -> JsonObject:
    """Return the fields of a config or a generation config that name tokens, with new ids."""
    found = {name: _in_lists(value, number) for name, value in told.items() if _CONFIG.fullmatch(name)}
    if bias := told.get("sequence_bias"):  # [[[ids], bias], …], or {(ids): bias}
        pairs = bias.items() if isinstance(bias, dict) else bias
        found["sequence_bias"] = [[_in_lists(list(ids), number), value] for ids, value in pairs]
    return found


def _in_lists(value: Any, number: Number) -> Any:
    if isinstance(value, list):
        return [_in_lists(each, number) for each in value]
    return number(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else value


def in_processor(value: Any, number: Number) -> Any:
    """Return the post-processor or the padding of a tokenizer.json with new ids."""
    if isinstance(value, list):
        return [in_processor(each, number) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: _in_field(name, each, number) for name, each in value.items()}


def _in_field(name: str, value: Any, number: Number) -> Any:
    if name == "ids":
        return [number(each) for each in value]
    if name in ("sep", "cls") and isinstance(value, list):  # of BertProcessing and RobertaProcessing: text, id
        return [value[0], number(value[1])]
    return number(value) if name == "pad_id" else in_processor(value, number)
