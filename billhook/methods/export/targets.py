"""What a target can express, as data: forms of checkpoints, and the shape of a student that has to fit one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from billhook.core.anatomy import Anatomy, SiteSize
from billhook.core.errors import PlanError
from billhook.core.plan import PARTS, Part, Plan, Site
from billhook.core.results.exports import FaultReason
from billhook.models.load import Teacher
from billhook.models.pruned_config import has_shortcuts, stock_shape
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import stock_holds

Sites = Literal["removed", "zeros", "none"]
Widths = Literal["any", "alike", "none"]
STRICTEST = ("none", "alike", "zeros", "removed", "any")  # of two answers the first one holds for both


def _every(config: Any) -> str | None:
    return None


def _any_count(config: Any) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Fault:
    """What of a student has no place in a form: its kind, and in words, with what would be allowed."""

    reason: FaultReason
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Form:
    """One form of checkpoint that an export writes, and which students it can express.

    `sites`: a block that lacks one of its sites is written without it (`removed`), with `zeros` in its place, or
    not at all (`none`: only whole blocks may be missing). `mlp_widths`, `attention_widths`: `any`, all blocks
    `alike`, or `none`. `inserts`: what a repair put in the place of a removed site, factors of weights, and matrices
    in shortcuts; `constants`: of that only constants. `biases`: of output projections that have none in the stock
    type. `architectures`: stock model types; None is every one. `refuse`: a reason why the model of a config has no
    place in this form. `runtimes`: those that load it and can verify it, the first one does. `mlp_step`: widths of an
    mlp that waste nothing are multiples of it; a search for this form keeps to them. `attention_counts`: in how many
    KV groups an attention may be left, ascending, by the config; empty is any number. `first_attention`: the first
    block must keep its attention.
    """

    name: str = ""
    sites: Sites = "removed"
    mlp_widths: Widths = "any"
    attention_widths: Widths = "any"
    inserts: bool = True
    constants: bool = False
    biases: bool = True
    architectures: tuple[str, ...] | None = None
    refuse: Callable[[Any], str | None] = _every
    runtimes: tuple[str, ...] = ()
    mlp_step: int = 1
    attention_counts: Callable[[Any], tuple[int, ...]] = _any_count
    first_attention: bool = False

    def takes(self, model_type: str, config: Any) -> str | None:
        """Return why no student of this model has a place in this form; None where some have."""
        if not self.inserts and has_shortcuts(config):
            return "the matrices in the shortcuts of a model with a basis for each boundary; slice with one basis"
        if self.architectures is not None and model_type not in self.architectures:
            return f"models of type {model_type}; it takes {', '.join(self.architectures)}"
        return self.refuse(config)

    def widths(self, part: Part) -> Widths:
        return self.mlp_widths if part == "mlp" else self.attention_widths

    def fault(self, shape: StudentShape) -> Fault | None:
        """Return what of a student has no place in this form, and what would be allowed; None if all has."""
        if (reason := self.takes(shape.model_type, shape.config)) is not None:
            return Fault("model", reason)
        if self.sites == "none" and shape.single:
            return Fault("sites", f"a block without its {shape.single[0].part}; remove whole blocks")
        if self.first_attention and shape.single and shape.single[0] == Site(shape.first, "attention"):
            return Fault("sites", f"a first block without its attention; keep {shape.single[0]}")
        for part in PARTS:
            found, most = shape.widths(part), self.widths(part)
            if most == "none" and found != "whole":
                return Fault("widths", f"a width of its own for {part}s; remove sites or blocks")
            if most == "alike" and found == "own":
                experts = " or numbers of experts" if shape.experts else ""
                text = f"{part}s of different widths{experts}; narrow all of them alike, or remove whole ones"
                return Fault("widths", text)
        counts = self.attention_counts(shape.config)
        if counts and (odd := sorted(set(shape.kv_groups) - set(counts))):
            return Fault("kv_groups", f"an attention of {odd[0]} KV groups; keep {', '.join(map(str, counts))}")
        if not self.inserts and (shape.patches or (shape.constants and not self.constants)):
            return Fault("patches", "what a repair puts in the place of a site; recover by fold alone")
        if not self.inserts and shape.factors:
            text = f"two factors of a weight, as {shape.factors[0]} has; start from the model without factors"
            return Fault("factors", text)
        if not self.biases and shape.biases:
            text = f"a bias of the output of {shape.biases[0]}, which a recovery added; leave that recovery out"
            return Fault("biases", text)
        return None


@dataclass(frozen=True, slots=True)
class StudentShape:
    """What of a student a form has to express, what an earlier pruning did included.

    `single`: missing sites of blocks of which the other site is kept. `mlps`, `attentions`: `whole`, narrowed all
    `alike` in a way that the stock config can say, or each with its `own` width. `kv_groups`: in how many KV groups
    narrowed attentions are left. `first`: the number of the first block that is left. `experts`: whether some mlp has
    several. `patches`: what repairs put in the place of sites that is more than a constant; `constants`: the others.
    `factors`: sites of which weights are two factors.
    """

    model_type: str
    config: Any
    single: tuple[Site, ...] = ()
    mlps: Literal["whole", "alike", "own"] = "whole"
    attentions: Literal["whole", "alike", "own"] = "whole"
    patches: tuple[Site, ...] = ()
    constants: tuple[Site, ...] = ()
    biases: tuple[Site, ...] = ()
    kv_groups: tuple[int, ...] = ()
    first: int = 0
    experts: bool = False
    factors: tuple[Site, ...] = ()

    def widths(self, part: Part) -> Literal["whole", "alike", "own"]:
        return self.mlps if part == "mlp" else self.attentions


def student_shape(teacher: Teacher, plan: Plan, repair: Repair = NO_REPAIR) -> StudentShape:
    """Return what of `plan` and `repair`, and of what an earlier pruning did to `teacher`, a form has to express."""
    earlier = teacher.pruned
    removed = Plan(teacher.removed_earlier.removed | plan.removed)
    whole = set(removed.blocks())
    single = tuple(site for site in removed.sites() if site.block not in whole)
    own_type = str(teacher.model.config.model_type).startswith("billhook-")

    def kept(part: Part) -> dict[Site, int | None]:
        """Return in how many groups each narrowed site of a part is left, None of one that is not narrowed."""
        sites = [s.site for s in teacher.anatomy.sites if s.site.part == part and s.site not in removed.removed]
        told = {site: len(each.groups) for site, each in earlier.narrowed.items()}
        told |= {each.site: len(each.groups) for each in plan.narrowed}
        return {site: told.get(site) for site in sites}

    stock = stock_holds(teacher, plan) if plan.narrowed else not own_type

    def widths(part: Part) -> Literal["whole", "alike", "own"]:
        if set(kept(part).values()) <= {None}:
            return "whole"
        return "alike" if stock else "own"

    specs = {**earlier.patches, **{site: patch.spec() for site, patch in repair.patches.items()}}
    constants = {site for site, spec in specs.items() if not (spec["gain"] or spec["rank"])}
    return StudentShape(
        teacher.anatomy.model_type, teacher.model.config, single, widths("mlp"), widths("attention"),
        tuple(sorted(specs.keys() - constants)), tuple(sorted(constants)),
        tuple(sorted({*_earlier_biases(teacher), *repair.biases})),
        tuple(sorted({count for count in kept("attention").values() if count is not None})),
        min(site.block for part in PARTS for site in kept(part)),
        any(size.experts > 1 for size in teacher.anatomy.sites),
        tuple(sorted(site for site in earlier.factors if site not in removed.removed)),
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
    for form in forms:
        if form.fault(shape) is None:
            return form
    told = nearest_fault(forms, shape)
    raise PlanError(f"The export {name} has no place for {told}, or take another export: {', '.join(others)}.")


def nearest_fault(forms: Sequence[Form], shape: StudentShape) -> Fault:
    """Return what keeps a student from the most generous of the forms that take its model, none of which it fits.

    Where none takes the model: from the last of those that know its type, or from the last one.
    """
    taking = [form for form in forms if form.takes(shape.model_type, shape.config) is None]
    known = [form for form in forms if shape.model_type in (form.architectures or ())]
    fault = (taking or known or list(forms))[-1].fault(shape)
    assert fault is not None, "it fits none"
    return fault


def limits(forms_by_target: Sequence[Sequence[Form]], model_type: str, config: Any) -> Form | None:
    """Return one form that says what all targets can express of a model; None where one of them takes none of it.

    Of each target the most generous form that takes the model counts.
    """
    merged = Form()
    for forms in forms_by_target:
        taking = [form for form in forms if form.takes(model_type, config) is None]
        if not taking:
            return None
        merged = narrower(merged, max(taking, key=_generosity))
    return merged


def narrower(one: Form, other: Form) -> Form:
    """Return what both of two forms can express."""
    return replace(
        one,
        sites=stricter(one.sites, other.sites), mlp_widths=stricter(one.mlp_widths, other.mlp_widths),
        attention_widths=stricter(one.attention_widths, other.attention_widths),
        inserts=one.inserts and other.inserts, biases=one.biases and other.biases,
        constants=(one.inserts or one.constants) and (other.inserts or other.constants),
        mlp_step=math.lcm(one.mlp_step, other.mlp_step),
        attention_counts=_both_counts(one.attention_counts, other.attention_counts),
        first_attention=one.first_attention or other.first_attention,
    )  # fmt: skip


def stricter(one: Any, other: Any) -> Any:
    """Return that of two answers of forms which holds for both."""
    return min(one, other, key=STRICTEST.index)


def _both_counts(
    one: Callable[[Any], tuple[int, ...]], other: Callable[[Any], tuple[int, ...]]
) -> Callable[[Any], tuple[int, ...]]:
    """Return the numbers of KV groups that two forms allow."""

    def counts(config: Any) -> tuple[int, ...]:
        first, second = one(config), other(config)
        return tuple(sorted(set(first) & set(second))) if first and second else first or second

    return counts


def _generosity(form: Form) -> tuple[int, ...]:
    answers = (form.sites, form.mlp_widths, form.attention_widths)
    return (*(STRICTEST.index(answer) for answer in answers), int(form.inserts), int(form.constants), int(form.biases))


def limited(anatomy: Anatomy, most: Form, config: Any) -> Anatomy:
    """Return an anatomy whose sites cannot be narrowed to what a form has no place for."""

    def size_of(size: SiteSize) -> SiteSize:
        if most.widths(size.site.part) == "none":
            return replace(size, groups=(), group=None)
        if size.site.part == "mlp":
            return replace(size, multiple=math.lcm(size.multiple, most.mlp_step))
        return replace(size, counts=most.attention_counts(config))

    return replace(anatomy, sites=tuple(map(size_of, anatomy.sites)))
