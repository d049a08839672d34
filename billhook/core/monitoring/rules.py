"""Rules of alerts as YAML: what may be written, with which units, and what a mistake is told."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from billhook.core.errors import RecipeError, UsageError, nearest, option
from billhook.core.files.foreign_files import load_unique_yaml
from billhook.core.monitoring.alerts import Against, Kind, Rule, Severity, Unit
from billhook.core.plan_files import find_path

DEFAULTS = Path(__file__).parent  # a file for watches, and one for runs
MOST_BYTES = 2**16  # of a file
BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
REFERENCES: dict[str, Against] = {"first round": "", "baseline": "baseline"}  # of ratios
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class _Limits:
    """How the limit of a kind is written: its key, an example of each spelling, and whether it is a lowest one."""

    key: str
    examples: tuple[str, ...]
    falls: bool = False


_LOSSES = ("1pp", "3%ppl")
KINDS: dict[Kind, _Limits] = {
    "quality": _Limits("loses", _LOSSES),
    "drift": _Limits("loses", _LOSSES),
    "latency": _Limits("above", ("1.5x", "2s")),
    "throughput": _Limits("below", ("0.8x", "20tokens/s"), falls=True),
    "errors": _Limits("above", ("5%",)),
    "speed": _Limits("below", ("80%",), falls=True),
    "memory": _Limits("above", ("8GB",)),
    "stopped": _Limits("", ()),
    "stalled": _Limits("after", ("30min",)),
}


class _Written(BaseModel):
    """One rule as it is written. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1, max_length=80)]
    when: str
    severity: str = "warning"
    of: str = ""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    loses: str | None = None
    above: str | None = None
    below: str | None = None
    after: str | None = None
    against: str | None = None


def read_rules(path: str | Path) -> tuple[Rule, ...]:
    """Return the rules of a YAML file. Raises RecipeError, which says what is allowed."""
    file = find_path(path)
    if file is None or not file.is_file():
        raise RecipeError(f"There is no file of rules {path}. Give a YAML file, such as:\n{EXAMPLE}")
    import yaml

    try:
        with file.open("rb") as opened:
            raw = opened.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise RecipeError(f"{path} has more than {MOST_BYTES // 1024} KB, which no file of rules has.")
        value = load_unique_yaml(raw.decode("utf-8"), "file of rules")
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}). Give another file.") from error
    return parse_rules(value, str(path))


def default_rules(name: str) -> tuple[Rule, ...]:
    """Return the rules that come with Billhook: `watch` for watched models, `runs` for what ends."""
    return read_rules(DEFAULTS / f"{name}.yaml")


EXAMPLE = "rules:\n- name: too slow\n  when: latency\n  above: 1.5x"


def parse_rules(value: object, where: str) -> tuple[Rule, ...]:
    """Return the rules of a value of YAML. Raises RecipeError for an unknown key, kind or unit, with the nearest."""
    listed = value.get("rules") if isinstance(value, Mapping) else None
    if not isinstance(listed, list) or set(value or ()) != {"rules"}:  # type: ignore[call-overload]
        raise RecipeError(f"{where} holds no list under the one key `rules`. Write for example:\n{EXAMPLE}")
    rules = tuple(_rule(each, f"{where}, rule {number},") for number, each in enumerate(listed, 1))
    if len({rule.name for rule in rules}) < len(rules):
        twice = next(rule.name for rule in rules if sum(rule.name == other.name for other in rules) > 1)
        raise RecipeError(f"{where} has two rules called {twice!r}. Rename one of them.")
    return rules


def _rule(value: object, where: str) -> Rule:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} is {reprlib.repr(value)}, not a rule. Write for example:\n{EXAMPLE}")
    try:
        written = _Written(**{str(key): each for key, each in value.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where} has the unknown key {key!r}.{_guess(key, _Written.model_fields)}") from error
        if first["type"] == "missing":
            raise RecipeError(f"{where} has no {key!r}. Write for example:\n{EXAMPLE}") from error
        raise RecipeError(f"{where} has {key}: {reprlib.repr(first['input'])}. {first['msg']}.") from error
    return _checked(written, where)


def _guess(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"{f' Did you mean {near}?' if near else ''} Known: {', '.join(known)}."


def _checked(written: _Written, where: str) -> Rule:
    kind: Any = written.when
    if kind not in KINDS:
        raise RecipeError(f"{where} has when: {written.when!r}, which is not watched.{_guess(written.when, KINDS)}")
    severity: Any = written.severity
    if severity not in get_args(Severity):
        raise RecipeError(f"{where} has the severity {severity!r}.{_guess(severity, get_args(Severity))}")
    limits, given = KINDS[kind], {"loses": written.loses, "above": written.above, "below": written.below}
    given |= {"after": written.after}
    for key, text in given.items():
        if text is not None and key != limits.key:
            takes = (
                f"takes `{limits.key}`, such as {limits.key}: {limits.examples[0]}" if limits.key else "has no limit"
            )
            raise RecipeError(f"{where} has `{key}`, and {kind} {takes}.")
    limit, unit = _limit(kind, given.get(limits.key), where)
    against = _against(written, unit, where)
    about = {"falls": limits.falls, "what": written.of, "rounds": written.rounds, "against": against}
    return Rule(written.name, kind, severity, limit, unit, **about)  # type: ignore[arg-type]


def _against(written: _Written, unit: Unit, where: str) -> Against | None:
    """What a ratio is to; None: whatever there is."""
    if written.against is None:
        return None
    if written.against not in REFERENCES:
        raise RecipeError(f"{where} has against: {written.against!r}.{_guess(written.against, REFERENCES)}")
    if unit != "x":
        raise RecipeError(f"{where} has `against`, which goes with a ratio. Write for example above: 1.5x.")
    return REFERENCES[written.against]


def _limit(kind: Kind, text: str | None, where: str) -> tuple[float, Unit]:
    limits = KINDS[kind]
    if not limits.key:
        return 0.0, ""
    allowed = " or ".join(f"{limits.key}: {example}" for example in limits.examples)
    if text is None:
        raise RecipeError(f"{where} has no limit. Write {allowed}.")
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([a-zA-Z%/]*)\s*", text)
    number, spelled = (float(match[1]), match[2]) if match else (0.0, "")
    spellings = {"memory": BYTES.keys(), "stalled": SECONDS.keys()}
    units = set(spellings.get(kind, (re.sub(r"[0-9.]", "", example) for example in limits.examples)))
    if match is None or spelled not in units:
        what = f"the unit {spelled!r}" if spelled else "no unit" if match else "no number"
        raise RecipeError(f"{where} has {limits.key}: {text!r}, which has {what}. Write {allowed}.")
    if spelled == "pp" and number > 100:
        raise RecipeError(f"{where} has {limits.key}: {text!r}, more than 100 percentage points. Write {allowed}.")
    if kind == "memory":
        return number * BYTES[spelled], "bytes"
    if kind == "stalled":
        return number * SECONDS[spelled], "s"
    unit: Any = spelled
    return number, unit


def parse_seconds(text: str, name: str) -> float:
    """Return a time such as `1h`, `30min` or `10s` in seconds. Raises UsageError; `name`: of the option."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z]+)\s*", text)
    if match is None or match[2] not in SECONDS:
        raise UsageError(f"{option(name, text)} is no time. Write for example {option(name, '1h')}, 30min or 10s.")
    return float(match[1]) * SECONDS[match[2]]
