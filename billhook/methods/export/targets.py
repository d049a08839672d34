"""What a target can express, as data: forms of checkpoints, and the shape of a student that has to fit one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from billhook.core.errors import PlanError
from billhook.core.plan import PARTS, Part, Plan, Site
from billhook.models.load import Teacher
from billhook.models.pruned_config import stock_shape
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import stock_holds

Sites = Literal["removed", "zeros", "none"]
Widths = Literal["any", "alike", "none"]
STRICTEST = ("none", "alike", "zeros", "removed", "any")  # of two answers the first one holds for both


def _every(config: Any) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Form:
    """One form of checkpoint that an export writes, and which students it can express.

    `sites`: a block that lacks one of its sites is written without it (`removed`), with `zeros` in its place, or not at
    all (`none`: only whole blocks may be missing). `mlp_widths`, `attention_widths`: `any`, all blocks `alike`, or
    `none`. `inserts`: what a repair put in the place of a removed site. `biases`: of output projections that have none
    in the stock type. `architectures`: stock model types; None is every one. `refuse`: a reason why the model of a
    config has no place in this form. `runtimes`: those that load it and can verify it, the first one does.
    """

    name: str = ""
    sites: Sites = "removed"
    mlp_widths: Widths = "any"
    attention_widths: Widths = "any"
    inserts: bool = True
    biases: bool = True
    architectures: tuple[str, ...] | None = None
    refuse: Callable[[Any], str | None] = _every
    runtimes: tuple[str, ...] = ()

    def takes(self, model_type: str, config: Any) -> str | None:
        """Return why no student of this model has a place in this form; None where some have."""
        if self.architectures is not None and model_type not in self.architectures:
            return f"models of type {model_type}; it takes {', '.join(self.architectures)}"
        return self.refuse(config)

    def widths(self, part: Part) -> Widths:
        return self.mlp_widths if part == "mlp" else self.attention_widths

    def fault(self, shape: StudentShape) -> str | None:
        """Return what of a student has no place in this form, and what would be allowed; None if all has."""
        if (reason := self.takes(shape.model_type, shape.config)) is not None:
            return reason
        if self.sites == "none" and shape.single:
            return f"a block without its {shape.single[0].part}; remove whole blocks"
        for part in PARTS:
            found, most = shape.widths(part), self.widths(part)
            if most == "none" and found != "whole":
                return f"a width of its own for {part}s; remove sites or blocks"
            if most == "alike" and found == "own":
                return f"{part}s of different widths; narrow all of them alike, or remove whole ones"
        if not self.inserts and shape.patches:
            return "what a repair puts in the place of a site; recover by fold alone"
        if not self.biases and shape.biases:
            return f"a bias of the output of {shape.biases[0]}, which a recovery added; leave {shape.recoveries} out"
        return None


@dataclass(frozen=True, slots=True)
class StudentShape:
    """What of a student a form has to express, what an earlier pruning did included.

    `single`: missing sites of blocks of which the other site is kept. `mlps`, `attentions`: `whole`, narrowed all
    `alike` in a way that the stock config can say, or each with its `own` width.
    """

    model_type: str
    config: Any
    single: tuple[Site, ...] = ()
    mlps: Literal["whole", "alike", "own"] = "whole"
    attentions: Literal["whole", "alike", "own"] = "whole"
    patches: tuple[Site, ...] = ()
    biases: tuple[Site, ...] = ()
    recoveries: str = "the recovery"

    def widths(self, part: Part) -> Literal["whole", "alike", "own"]:
        return self.mlps if part == "mlp" else self.attentions


def student_shape(teacher: Teacher, plan: Plan, repair: Repair = NO_REPAIR) -> StudentShape:
    """Return what of `plan` and `repair`, and of what an earlier pruning did to `teacher`, a form has to express."""
    earlier = teacher.pruned
    removed = Plan(teacher.removed_earlier.removed | plan.removed)
    whole = set(removed.blocks())
    single = tuple(site for site in removed.sites() if site.block not in whole)
    own_type = str(teacher.model.config.model_type).startswith("billhook-")
    holds: dict[bool, bool] = {}

    def widths(part: Part) -> Literal["whole", "alike", "own"]:
        kept = [s.site for s in teacher.anatomy.sites if s.site.part == part and s.site not in removed.removed]
        now = {each.site: len(each.groups) for each in plan.narrowed if each.site in kept}
        before = {site: len(each.groups) for site, each in earlier.narrowed.items() if site in kept}
        counts = {site: now.get(site, before.get(site)) for site in kept}
        if not now and not before:
            return "whole"
        if None in counts.values() or len(set(counts.values())) > 1 or (own_type and before and not now):
            return "own"
        if now and True not in holds:
            holds[True] = stock_holds(teacher, plan)
        return "alike" if not now or holds[True] else "own"

    return StudentShape(
        teacher.anatomy.model_type, teacher.model.config, single, widths("mlp"), widths("attention"),
        tuple(sorted({*earlier.patches, *repair.patches})), tuple(sorted({*_earlier_biases(teacher), *repair.biases})),
    )  # fmt: skip


def _earlier_biases(teacher: Teacher) -> list[Site]:
    """List the sites whose output has a bias that an earlier recovery added: the stock type has none there."""
    config, row, model_type = teacher.model.config, teacher.architecture, teacher.anatomy.model_type
    outputs = {"attention": row.attention_output, "mlp": row.mlp_output}
    biased = [
        site
        for site, each in teacher.pruned.narrowed.items()
        if any(name.endswith(f"{outputs[site.part]}.bias") for name in (each.module or {}).get("shapes", ()))
    ]
    stock = stock_shape(config, model_type, {}) if biased else None
    names = {name for name, _ in stock.named_parameters()} if stock is not None else set()
    own = {part for part, output in outputs.items() if any(name.endswith(f"{output}.bias") for name in names)}
    return [site for site in biased if site.part not in own]


def first_form(name: str, forms: Sequence[Form], shape: StudentShape, others: Sequence[str]) -> Form:
    """Return the first of the forms of the export `name` that a student fits.

    Raises PlanError with what has no place in the most generous of them, and the `others` exports.
    """
    faults = [form.fault(shape) for form in forms]
    for form, found in zip(forms, faults, strict=True):
        if found is None:
            return form
    fitting = [f for form, f in zip(forms, faults, strict=True) if form.takes(shape.model_type, shape.config) is None]
    told = (fitting or faults)[-1]
    raise PlanError(f"The export {name} has no place for {told}, or take another export: {', '.join(others)}.")


def limits(forms_by_target: Sequence[Sequence[Form]], model_type: str, config: Any) -> Form | None:
    """Return one form that says what all targets can express of a model; None where one of them takes none of it.

    Of each target the most generous form that takes the model counts.
    """
    merged: Form | None = Form()
    for forms in forms_by_target:
        taking = [form for form in forms if form.takes(model_type, config) is None]
        if not taking or merged is None:
            return None
        best = max(taking, key=_generosity)
        merged = replace(
            merged,
            sites=stricter(merged.sites, best.sites), mlp_widths=stricter(merged.mlp_widths, best.mlp_widths),
            attention_widths=stricter(merged.attention_widths, best.attention_widths),
            inserts=merged.inserts and best.inserts, biases=merged.biases and best.biases,
        )  # fmt: skip
    return merged


def stricter(one: Any, other: Any) -> Any:
    """Return that of two answers of forms which holds for both."""
    return min(one, other, key=STRICTEST.index)


def _generosity(form: Form) -> tuple[int, ...]:
    answers = (form.sites, form.mlp_widths, form.attention_widths)
    return (*(STRICTEST.index(answer) for answer in answers), int(form.inserts), int(form.biases))
