"""Recipe <-> YAML through one schema: what a pruning run is told. Every option of `billhook prune` is a field here."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from billhook.core.budget import VOCABULARY, Budget, parse_budgets, parse_bytes, spell_budget
from billhook.core.errors import RecipeError, nearest, option
from billhook.core.files.foreign_files import every_value, load_unique_yaml
from billhook.core.margin import Margin
from billhook.core.plan import shorten
from billhook.core.plan_files import find_path
from billhook.core.registry import OptionValues, split_names
from billhook.data.skills import SkillName, parse_skills
from billhook.data.texts import SELF, split_sources
from billhook.engine.workers.crew import parse_workers

MOST_RECIPE_BYTES = 2**16
MOST_RECIPE_VALUES = 10_000  # counted as often as YAML's aliases repeat them
MOST = 2**31 - 1  # tokens, sequences, channels: more than any machine takes
BUILTIN = Path(__file__).parent / "recipes"
TARGETS = ("remove", "plan", "within")  # of which a recipe has one
FORMER_SEARCHES = {"narrow": "rank_channels", "solve": "ilp", "span": "contiguous"}  # in recipes of version 0.1

REPEATED = ("set", "recover_set")  # options by name


class TextOptions(BaseModel):
    """A model, how it is loaded, and the text that it reads. Frozen; unknown keys are refused. Nothing here acts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Annotated[str, Field(description="Folder, .gguf file, Hugging Face name, or demo")] = "demo"
    set: Annotated[
        dict[str, bool | int | float | str],
        Field(description="Option of a metric or evaluation: kind=vector; repeatable"),
    ] = {}
    memory: Annotated[str | None, Field(description="Memory limit such as 4GB; a larger model is streamed")] = None
    data: Annotated[str, Field(description="Calibration text: a file, a data set's name, pydoc or self")] = "pydoc"
    eval_data: Annotated[str | None, Field(description="Held-out text [default: split off --data]")] = None
    field: Annotated[str, Field(description="Field of a .jsonl row that holds the text")] = "text"
    seed: Annotated[int, Field(description="Seed of every random choice", le=MOST, ge=0)] = 0
    device: Annotated[str, Field(description="Device: auto, cpu, mps, cuda:1; several: cuda:0-7")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Compute dtype: auto (float32 on a CPU), float32, bfloat16, float16"),
    ] = "auto"
    trust_remote_code: Annotated[bool, Field(description="Run Python code of the checkpoint")] = False

    @field_validator(*REPEATED, mode="before", check_fields=False)
    @classmethod
    def _named(cls, value: object, info: ValidationInfo) -> object:
        return _by_name(str(info.field_name), value)

    @field_validator("model", "data", "eval_data", "recover_data", "plan", mode="before", check_fields=False)
    @classmethod
    def _path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("memory")
    @classmethod
    def _bytes(cls, value: str | None) -> str | None:
        return value if value is None or parse_bytes(value) else None

    @property
    def memory_bytes(self) -> int | None:
        """The memory budget in bytes, if there is one."""
        return None if self.memory is None else parse_bytes(self.memory)


class EvalOptions(TextOptions):
    """What an evaluation is told: `data` is what a pruning would calibrate on, of which the held-out half counts."""

    eval_tokens: Annotated[int, Field(description="Held-out tokens", le=MOST, ge=64)] = 16384
    eval_length: Annotated[int, Field(description="Tokens per held-out sequence", le=MOST, ge=16)] = 512


class CalibrationOptions(TextOptions):
    """What a score is told: the model, and the text that it is scored on."""

    loss: Annotated[str, Field(description="Objective to minimise: kl, js, nll, … or task:FILE")] = "kl"
    tokens: Annotated[int, Field(description="Calibration tokens", le=MOST, ge=16)] = 4096
    length: Annotated[int, Field(description="Tokens per calibration sequence", le=MOST, ge=16)] = 128
    self_share: Annotated[float, Field(description="Share of calibration tokens that the model writes", ge=0, lt=1)] = (
        0.0
    )


class Recipe(CalibrationOptions, EvalOptions):
    """What a pruning run is told. Frozen; unknown keys are refused."""

    set: Annotated[
        dict[str, bool | int | float | str],
        Field(description="Option of search or metric, such as front=0.4; repeatable"),
    ] = {}
    self_share: Annotated[float, Field(description="Share of calibration tokens that the model writes", ge=0, lt=1)] = (
        0.5
    )
    about: Annotated[str, Field(description="What a recipe takes from its paper, and what it cannot know")] = ""
    remove: Annotated[
        str | None, Field(description="How much to remove: 25%, 15sites, 30%kv, 60%vocabulary …; repeatable")
    ] = None
    plan: Annotated[str | None, Field(description="Plan instead of a search: attention.7,mlp.16, or its file")] = None
    within: Annotated[str | None, Field(description="Margin instead of a size: 3%ppl, or 1pp:FILE")] = None
    search: Annotated[str, Field(description="Search method, as `billhook methods` lists them")] = "swap"
    metric: Annotated[str | None, Field(description="Metric for oneshot, ilp, contiguous, rank_channels, joint")] = None
    uniform: Annotated[bool, Field(description="Equal widths in all blocks, which keep the stock shape")] = False
    multiple: Annotated[int, Field(description="Widths in multiples of this: 8, 32, 256", le=MOST, ge=1)] = 1
    fast: Annotated[bool, Field(description="Race the candidates of a round: faster, not exact")] = False
    shortlist: Annotated[int, Field(description="Candidates in each round of --fast", le=MOST, ge=2)] = 12
    risk: Annotated[float, Field(description="Risk of --fast to drop the best, per comparison", gt=0, lt=0.5)] = 0.05
    finalists: Annotated[int, Field(description="Plans judged again on unseen text", le=MOST, ge=0)] = 8
    audit: Annotated[bool, Field(description="Exact check of every round of --fast, with its regret")] = False
    protect: Annotated[str, Field(description="Sites or blocks to keep: attention.0,mlp.27-29,0-3,last2")] = ""
    batch: Annotated[int, Field(description="Sequences at a time, for a budget in ms", le=MOST, ge=1)] = 1
    context: Annotated[int, Field(description="Tokens before the timed one, for a budget in ms", le=MOST, ge=1)] = 128
    recover: Annotated[str, Field(description="Recovery methods after pruning, in order: fold,lora, or none")] = ""
    fold_in_search: Annotated[bool, Field(description="Judge the best candidates of a round after a fold")] = False
    recover_set: Annotated[
        dict[str, bool | int | float | str],
        Field(description="Option of a recovery: minutes=15, lora.rank=8; repeatable"),
    ] = {}
    recover_data: Annotated[str | None, Field(description="Text for the recovery [default: that of --data]")] = None
    recover_tokens: Annotated[int, Field(description="Tokens for the recovery at most", le=MOST, ge=64)] = 32768
    recover_length: Annotated[int, Field(description="Tokens per sequence for the recovery", le=MOST, ge=16)] = 256
    proof: Annotated[Literal["full", "loss"], Field(description="full, or loss: no skills, answers and speed")] = "full"
    skills: Annotated[str, Field(description="Skills to test: arithmetic,brackets,copying,recall, or none")] = "all"
    stock: Annotated[bool, Field(description="Stock shape: zeros in removed sites, no speed-up")] = False
    export: Annotated[str, Field(description="Forms of the checkpoint, as `billhook methods` lists them")] = (
        "transformers"
    )
    target: Annotated[str, Field(description="What serves the model: llama.cpp,mlx … as `billhook targets` lists")] = ""
    workers: Annotated[int | str, Field(description="Workers that share the work: 4, ray:n=8, slurm:n=8")] = 1

    @field_validator("remove", mode="before")
    @classmethod
    def _readable(cls, value: object) -> object:
        if value is None:
            return None
        pieces = value if isinstance(value, list | tuple) else [value]
        return ",".join(map(str, parse_budgets(",".join(map(spell_budget, pieces)))))

    @model_validator(mode="before")
    @classmethod
    def _stock_is_an_export(cls, values: OptionValues) -> OptionValues:
        """The export `stock` and the option of that name are one."""
        names = split_names(str(values.get("export", "")))
        written = ",".join("transformers" if name == "stock" else name for name in names)
        return {**values, "export": written, "stock": True} if "stock" in names else values

    _renamed_search = field_validator("search", mode="before")(lambda value: FORMER_SEARCHES.get(str(value), value))
    _spelled_workers = field_validator("workers", mode="before")(lambda value: parse_workers(value).spelled())

    @field_validator("recover")
    @classmethod
    def _recoveries(cls, value: str) -> str:
        return "" if value == "none" else value

    @field_validator("skills")
    @classmethod
    def _skills(cls, value: str) -> str:
        return ",".join(parse_skills(value)) or "none" if value != "all" else value

    @field_validator("within")
    @classmethod
    def _margin(cls, value: str | None) -> str | None:
        return None if value is None else str(Margin.parse(value))

    @model_validator(mode="after")
    def _one_target(self) -> Recipe:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) if given else "neither remove nor plan nor within"
            first = " To cut the vocabulary first: billhook vocabulary." if self.vocabulary else ""
            raise RecipeError(
                f"The recipe has {what}. Give one: {option('remove', '25%sites')}, "
                f"{option('plan', 'attention.7,mlp.16')}, or {option('within', '3%ppl')}.{first}"
            )
        if twice := [name for name in self.recoveries if self.recoveries.count(name) > 1]:
            raise RecipeError(f"{option('recover', self.recover)} does {twice[0]} twice. Name every recovery once.")
        if self.stock and "transformers" not in split_names(self.export):
            raise RecipeError(
                f"{option('stock', True)} writes the export stock, and {option('export', self.export)} another. Leave "
                "one out."
            )
        return self

    @property
    def writes(self) -> str:
        """The name of the export that writes the checkpoint itself."""
        from billhook.methods.export import arranged

        return "stock" if self.stock else arranged(split_names(self.export))[0]

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the software that has to load the student."""
        return split_names(self.target)

    @property
    def tested_skills(self) -> tuple[SkillName, ...]:
        """The skills that are tested after pruning."""
        return parse_skills(self.skills)

    @property
    def recoveries(self) -> tuple[str, ...]:
        """The names of the recoveries, in order; none where no plan removes anything."""
        return () if self.vocabulary_alone else tuple(name.removesuffix("?") for name in split_names(self.recover))

    @property
    def optional_recoveries(self) -> frozenset[str]:
        """Those with a question mark behind their name: left out where they can do nothing."""
        return frozenset(name.removesuffix("?") for name in split_names(self.recover) if name.endswith("?"))

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What a plan must remove, if the recipe says how much; of what is left once the vocabulary is cut."""
        return tuple(each for each in parse_budgets(self.remove) if each.unit != VOCABULARY) if self.remove else ()

    @property
    def vocabulary(self) -> Budget | None:
        """How much of the vocabulary must go before, if the recipe says that."""
        return next((each for each in parse_budgets(self.remove or "1sites") if each.unit == VOCABULARY), None)

    @property
    def vocabulary_alone(self) -> bool:
        """Whether no plan is chosen, since all that is cut is the vocabulary."""
        return self.vocabulary is not None and not self.budgets

    @property
    def margin(self) -> Margin | None:
        """What the student may lose, if the recipe says that."""
        return None if self.within is None else Margin.parse(self.within)

    def to_yaml(self) -> str:
        """This recipe as YAML, without what is at its default."""
        import yaml

        values = self.model_dump(exclude_defaults=True)
        return yaml.safe_dump({name: values[name] for name in in_order(values)}, sort_keys=False, allow_unicode=True)


# Names of fields as help and YAML list them: first what is pruned, and how much.
ORDER = (
    *("about", "model", *TARGETS, "search", "metric", "loss", "set", "uniform", "multiple", "fast", "shortlist"),
    *("risk", "finalists", "audit", "memory", "protect", "batch", "context", "data", "self_share", "eval_data"),
    *("field", "tokens", "length", "eval_tokens", "eval_length", "recover", "fold_in_search", "recover_set"),
    *("recover_data", "recover_tokens", "recover_length", "proof", "skills", "stock", "export", "target", "seed"),
    *("device", "dtype", "workers", "trust_remote_code"),
)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of fields in the order of a reader."""
    return sorted(names, key=ORDER.index)


Options = TypeVar("Options", bound=TextOptions)


def parse_recipe(values: Mapping[str, Any], where: str = "The recipe") -> Recipe:
    """A Recipe from plain values. Raises RecipeError that names the key, what it holds, and the nearest right key."""
    return parse_options(Recipe, values, where)


def parse_options(kind: type[Options], values: Mapping[str, Any], where: str = "The call") -> Options:
    """Options of one kind from plain values. Raises RecipeError as `parse_recipe`."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "?"
        if first["type"] == "extra_forbidden":
            raise _unknown_key(key, where, list(kind.model_fields)) from error
        raise RecipeError(f"{where} has {key}: {reprlib.repr(first['input'])}. {first['msg']}.") from error


def _unknown_key(key: str, where: str, known: Iterable[str]) -> RecipeError:
    near = nearest(key, known)
    guess = f" Did you mean {near}?" if near else ""
    return RecipeError(f"{where} has the unknown key {key!r}.{guess} Known: {', '.join(in_order(known))}.")


def recipe_names() -> list[str]:
    """The recipes that come with Billhook: one a published method, and our own."""
    return sorted(path.stem for path in BUILTIN.glob("*.yaml"))


def with_overrides(recipe: str | Path | None, **given: Any) -> OptionValues:
    """The values of a recipe, overruled by what is `given`, options one by one; a new target drops the recipe's."""
    values = {} if recipe is None else read_yaml(Path(recipe))
    own = values if str(recipe) not in recipe_names() else {}
    if any(given.get(name) is not None for name in TARGETS):
        values = {name: value for name, value in values.items() if name not in TARGETS}
    both = (name for name in REPEATED if given.get(name) and values.get(name))
    given |= {name: {**values[name], **_by_name(name, given[name])} for name in both}
    if own:  # what a call overrules may leave another key without effect
        target = {} if any(name in values | given for name in TARGETS) else {"remove": "1sites"}
        alone = {} if any(name in own for name in TARGETS) else {"remove": "1sites"}
        require_effect(own, parse_recipe(own | alone, str(recipe)), parse_recipe(values | given | target, "The call"))
    return values | given


def _by_name(field: str, value: Any) -> Any:
    """The options of a field by name, where they are typed as NAME=VALUE."""
    if not isinstance(value, list | tuple):
        return value
    pairs = [str(piece).partition("=") for piece in value]
    if wrong := next((name for name, equals, _ in pairs if not name or not equals), None):
        like = {"set": "front=0.4", "recover_set": "minutes=15"}[field]
        raise RecipeError(f"{option(field)} {wrong!r} has no value. Write NAME=VALUE, such as {like}.")
    return {name.strip(): text.strip() for name, _, text in pairs}


# -- options that need others -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Condition:
    """What options need to have an effect. `unmet`: why they have none, and what to type, for a message."""

    names: tuple[str, ...]
    met: Callable[[Recipe], bool]
    unmet: str


SITE_TIMES = ("batch", "context")  # how the time of a site is measured
OF_SEARCH = ("search", "metric", "uniform", "multiple", "fast", "finalists", "fold_in_search")
_FOLD = f"without a recovery. Add {option('recover', 'fold')}"
CONDITIONS = (
    Condition(("shortlist", "risk", "audit"), lambda of: of.fast, f"without {option('fast', True)}. Add that"),
    Condition(("recover_set",), lambda of: bool(of.recoveries), _FOLD),
    Condition(("recover_data", "recover_tokens", "recover_length"),
              lambda of: bool(of.recoveries) or of.fold_in_search, _FOLD),
    Condition(SITE_TIMES, lambda of: any(budget.unit == "ms" for budget in of.budgets),
              f"without a budget in time. Add {option('remove', '20%ms')}"),
    Condition((*OF_SEARCH, "recover", "protect"), lambda of: not of.vocabulary_alone,
              f"with the vocabulary alone. Add a size: {option('remove', '60%vocabulary,20%')}"),
    Condition(OF_SEARCH, lambda of: not of.plan,
              f"with {option('plan')}, of which nothing is searched. Give {option('remove')} instead"),
    Condition(("self_share",), lambda of: of.plan is None and ":" not in of.loss and SELF not in split_sources(of.data),
              f"with a plan, the loss of a task, or {option('data', SELF)}. Give {option('data', 'FILE')} and a size "
              "instead"),
)  # fmt: skip


def require_effect(given: Mapping[str, object], *recipes: Recipe) -> None:
    """Raise RecipeError for one of the `given` options that has an effect in none of the `recipes`.

    What is switched off, such as 0 or False, needs none.
    """
    for condition in CONDITIONS:
        for name in condition.names:
            if given.get(name) and not any(map(condition.met, recipes)):
                raise RecipeError(f"{option(name)} has no effect {condition.unmet}, or leave {option(name)} out.")


def read_yaml(path: Path) -> OptionValues:
    """The values of a recipe file, or of a recipe of ours by its name.

    Raises RecipeError if it cannot be read, or holds an unknown key or one twice.
    """
    file, names = find_path(path), recipe_names()
    if (file is None or not file.is_file()) and str(path) in names:
        file = BUILTIN / f"{path}.yaml"
    if file is None or not file.is_file():
        near = nearest(str(path)[:99], names)
        guess = f" Did you mean {near}?" if near else ""
        raise RecipeError(
            f"There is no recipe {shorten(str(path), 200)}.{guess} Give a YAML file, or one of ours: "
            f"{', '.join(names)}."
        )
    import yaml  # which a call without a recipe needs not

    try:
        with file.open("rb") as opened:
            raw = opened.read(MOST_RECIPE_BYTES + 1)
        if len(raw) > MOST_RECIPE_BYTES:
            raise RecipeError(f"{path} has more than {MOST_RECIPE_BYTES // 1024} KB, which no recipe has.")
        values = load_unique_yaml(raw.decode("utf-8"))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}). Give another recipe.") from error
    if sum(1 for _ in islice(every_value(values), MOST_RECIPE_VALUES + 1)) > MOST_RECIPE_VALUES:
        raise RecipeError(f"{path} repeats its values by aliases without end. Write them out.")
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no keys. A recipe looks like:\nmodel: demo\nremove: 25%sites")
    for key in map(str, values):
        if key not in Recipe.model_fields:
            raise _unknown_key(key, str(path), list(Recipe.model_fields))
    return values
