"""Comparisons, gates and task scores in words: rows of short strings, and sentences, that terminal and page share."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence

from billhook.core.errors import visible
from billhook.core.margin import BOUND, Margin
from billhook.core.results.comparisons import (
    ComparedSet,
    Comparison,
    GateCheck,
    GateReport,
    PairVerdict,
    SeenSets,
    TaskScores,
)
from billhook.core.results.measured import Estimate
from billhook.report.numbers import (
    Spell,
    format_accuracy,
    format_interval,
    format_number,
    format_perplexity,
    format_perplexity_ratio,
    format_points,
    pluralize,
    reliability_note,
    speed_change,
    visible_name,
)
from billhook.report.study_words import short_names

VERDICT_COLUMNS = ("Set", "Verdict", "A", "B", "B against A (95%)", "p")
GATE_COLUMNS = ("Set", "Baseline", "Student", f"Lost ({BOUND})", "May go", "Verdict")
SCORE_COLUMNS = ("Task", "Score", "Right", "95%", "Items")

MOST_ITEMS = 10**7  # beyond, no number of items is worth naming


def seen_warnings(seen: Sequence[SeenSets]) -> list[str]:
    """What every output must say first."""
    return [
        f"NOT A PROOF: {visible_name(each.model)} was made by a search that has seen some of "
        f"{' and '.join(map(visible_name, each.sets))}."
        for each in seen
    ]


def _ends(estimate: Estimate, spell: Spell) -> str:
    return format_interval({"low": estimate.low, "high": estimate.high}, spell)


# -- compare ----------------------------------------------------------------------------------------------------------


def model_names(result: Comparison) -> list[str]:
    """The models, A first, as they were named."""
    return [visible_name(each.model) for each in result.models]


def set_names(result: Comparison) -> dict[str, str]:
    """Short names of the sets."""
    return short_names(each.source for each in result.sets)


def verdict_rows(result: Comparison, other: int = 1) -> list[tuple[str, ...]]:
    """Under `VERDICT_COLUMNS`: one row for each set, of A and the model number `other`."""
    brief = set_names(result)
    rows: list[tuple[str, ...]] = []
    for each in result.sets:
        spell = format_perplexity if each.is_text else format_accuracy
        a, b = (spell(each.values[number].estimate.value) for number in (0, other))
        pair = each.pairs[other - 1]
        name = f"{brief[each.source]}, {'ppl' if each.is_text else each.score}"
        change, p, word = "other tokens", "–", "not comparable"
        if pair is not None:
            change = "{} ({})".format(*change_words(pair, each.is_text))
            p, word = p_value(pair.p_holm), pair.verdict
        rows.append((name, word, a, b, change, p))
    return rows


def change_words(pair: PairVerdict, is_text: bool) -> tuple[str, str]:
    """A change and its interval: `×1.62` and `1.55 to 1.70`, or `−6.2 pp` and `−8.1 to −4.3`."""
    if is_text:
        return format_perplexity_ratio(pair.change.value), _ends(pair.change, format_perplexity_ratio)
    return f"{format_points(pair.change.value)} pp", _ends(pair.change, format_points)


def p_value(p: float) -> str:
    """Three decimals; what is less is said to be."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def flip_words(result: Comparison, other: int = 1) -> list[str]:
    """How many items only A has right, and only B, set by set; and how many more an open question would take."""
    brief = set_names(result)
    return [f"{brief[each.source]}: {words}" for each in result.sets for words in _set_words(each, other)]


def _set_words(compared: ComparedSet, other: int) -> list[str]:
    pair, words = compared.pairs[other - 1], []
    if pair is None:
        return ["the two models have other tokens, and texts of other tokens do not pair."]
    if pair.gained is not None:
        words.append(f"of {compared.n:,} items {pair.lost} only A has right, {pair.gained} only B.")
    if pair.verdict == "undecided":
        kind = "texts" if compared.is_text else "items"
        few = pair.more is not None and pair.more < MOST_ITEMS
        more = f"about {pair.more:,} more {kind}" if few else f"no number of {kind} that there is"
        words.append(f"undecided; {more} would decide it.")
    if note := reliability_note(pair.change):
        words.append(note)
    return words


def size_rows(result: Comparison, other: int = 1) -> list[tuple[str, str, str, str]]:
    """(measure, A, B, change) of sizes, speed and memory."""
    a, b = result.models[0].sizes, result.models[other].sizes
    sizes = (
        ("Parameters", a.parameters, b.parameters, ""), ("On disk", a.bytes, b.bytes, "B"),
        ("KV cache / token", a.kv_bytes_per_token, b.kv_bytes_per_token, "B"),
        ("FLOPs / token", a.flops_per_token, b.flops_per_token, ""),
    )  # fmt: skip
    rows = [
        (label, format_number(first, unit), format_number(second, unit), _percent(second / first))
        for label, first, second, unit in sizes
        if first and second  # 0: not known, of a model in its runtime
    ]
    speed = result.speed[other - 1]
    if speed is None:
        return rows
    for label, first, second, ratio in (
        ("Prefill tokens/s", speed.first.prefill, speed.other.prefill, speed.prefill_ratio),
        ("Decode tokens/s", speed.first.decode, speed.other.decode, speed.decode_ratio),
    ):
        rows.append(
            (label, format_number(first.value), format_number(second.value), speed_change(first, second, ratio))
        )
    peaks = speed.first.peak_bytes, speed.other.peak_bytes
    if peaks[0] and peaks[1]:
        memory = (format_number(peak, "B") for peak in peaks)
        rows.append(("Peak memory", *memory, _percent(peaks[1] / peaks[0])))  # type: ignore[arg-type]
    return rows


def agreement_words(result: Comparison, other: int = 1) -> str:
    """How alike both are token by token, as a sentence; nothing where that was not measured."""
    alike = result.agreement[other - 1]
    if alike is None:
        return ""
    same, kl = alike.same, alike.kl
    return (
        f"On {alike.tokens:,} tokens of text B would say the same next token as A in {same.value:.1%} of the "
        f"places ({same.low:.1%} to {same.high:.1%}); KL of B to A {kl.value:.3f} nats per token "
        f"({kl.low:.3f} to {kl.high:.3f})."
    )


def _percent(ratio: float) -> str:
    return "unchanged" if ratio == 1 else f"{100 * (ratio - 1):+.1f}%".replace("-", "−")


def comparison_headline(result: Comparison, other: int = 1) -> str:
    """The verdict of the whole in one sentence."""
    a, b = model_names(result)[0], model_names(result)[other]
    counts = Counter(result.verdicts(other))
    if not counts:
        return f"{b} and {a} share no set on which they can be compared."
    sets = pluralize(counts.total(), "set")
    return f"{b} against {a}, {sets}: {verdict_counts(result, other)} ({margin_words(result)})."


def verdict_counts(result: Comparison, other: int = 1) -> str:
    """`worse on 2, equivalent on 1`."""
    counts = Counter(result.verdicts(other))
    words = [f"{word} on {counts[word]}" for word in ("worse", "undecided", "equivalent", "better") if counts[word]]
    return ", ".join(words) or "not comparable"


def margin_words(result: Comparison) -> str:
    """`margins: 1 pp of accuracy, 3% of perplexity`."""
    margins = f"{_amount(result.margins.accuracy)} pp of accuracy, {_amount(result.margins.perplexity)}% of perplexity"
    margins += "".join(f", {_amount(each)} pp on {set_names(result)[str(each.file)]}" for each in result.margins.files)
    return f"margins: {margins}"


def _amount(margin: Margin) -> str:
    return f"{float(margin.amount):g}"


# -- gate -------------------------------------------------------------------------------------------------------------


def gate_rows(report: GateReport) -> list[tuple[str, ...]]:
    """Under `GATE_COLUMNS`: one row a check."""
    brief = short_names(check.source for check in report.checks)
    rows: list[tuple[str, ...]] = []
    for check in report.checks:
        spell, lost = format_perplexity if check.is_text else format_accuracy, check.lost
        much, low, high = (f"{round(x, 2) + 0.0:+.2f}".replace("-", "−") for x in (lost.value, lost.low, lost.high))
        allowed = f"{_amount(check.margin)}{'%' if check.is_text else ' pp'}"
        name = f"{brief[check.source]}, {'ppl' if check.is_text else check.score}"
        values = spell(check.baseline), spell(check.student)
        rows.append((name, *values, f"{much} ({low} to {high})", allowed, check.verdict))
    return rows


def describe_check(check: GateCheck) -> str:
    """`loses 1.20 pp (one-sided 95%: 0.10 to 2.40); 1 may go`."""
    unit, lost = "% of perplexity" if check.is_text else "pp", check.lost
    verb = "loses" if lost.value >= 0 else "gains"
    return (
        f"{verb} {abs(lost.value):.2f} {unit} ({BOUND}: {lost.low:.2f} to {lost.high:.2f}); "
        f"{_amount(check.margin)} may go"
    )


def junit_xml(report: GateReport) -> bytes:
    """A gate as JUnit XML, a test case for each check."""
    failed = sum(check.verdict != "PASS" for check in report.checks)
    suite = ET.Element("testsuite", name="billhook gate", tests=str(len(report.checks)), failures=str(failed))
    for check in report.checks:
        name, words = visible_name(f"{check.source} ({check.score})"), visible(describe_check(check))
        case = ET.SubElement(suite, "testcase", classname=visible_name(report.student), name=name)
        if check.verdict != "PASS":
            ET.SubElement(case, "failure", type=check.verdict, message=words).text = words
        ET.SubElement(case, "system-out").text = words
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True))


def gate_notes(report: GateReport) -> list[str]:
    """On what intervals rest that are not reliable, set by set."""
    brief = short_names(check.source for check in report.checks)
    return [f"{brief[check.source]}: {note}" for check in report.checks if (note := reliability_note(check.lost))]


def gate_sentence(report: GateReport) -> str:
    """`PASS: pruned against tiny`."""
    return f"{report.verdict}: {visible_name(report.student)} against {visible_name(report.baseline)}"


# -- eval -------------------------------------------------------------------------------------------------------------


def score_rows(result: TaskScores) -> list[tuple[str, ...]]:
    """Under `SCORE_COLUMNS`: one row for each score."""
    brief = short_names(each.source for each in result.scores)
    rows: list[tuple[str, ...]] = []
    for each in result.scores:
        value, ends = each.estimate, _ends(each.estimate, format_accuracy)
        rows.append((brief[each.source], each.score, format_accuracy(value.value), ends, f"{value.n:,}"))
    return rows


def score_notes(result: TaskScores) -> list[str]:
    """On what intervals rest that are not reliable, set by set."""
    brief = short_names(each.source for each in result.scores)
    notes = ((brief[each.source], reliability_note(each.estimate)) for each in result.scores)
    return list(dict.fromkeys(f"{name}: {note}" for name, note in notes if note))
