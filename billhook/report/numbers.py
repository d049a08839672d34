"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from billhook.core.errors import visible
from billhook.core.results.exports import Verification
from billhook.core.results.measured import Estimate, Reason, TokenSetInfo

Spell = Callable[[float], str]
UNBOUNDED = 1e304  # stats.exp ends there


def printable(text: object) -> str:
    """Without what neither a page nor a terminal can show: control and direction characters."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def visible_name(text: object) -> str:
    """A name on one line, with what neither a page nor a terminal can show escaped."""
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def format_perplexity_ratio(nats: float) -> str:
    """A difference in nats as a ratio of perplexities."""
    from billhook.core.statistics import exp_capped  # numpy, which lists of runs need not

    return format_ratio(exp_capped(nats))


def format_nats(x: float) -> str:
    """A difference of losses: three decimals, no more digits than `short` where it is large."""
    return (f"{x:.3f}" if abs(x) < 10 else format_number(x)).replace("-", "−")


def format_accuracy(x: float) -> str:
    """`41.2%`."""
    return f"{x:.1%}"


def format_points(x: float) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return f"{round(100 * x, 1) + 0.0:+.1f}".replace("-", "−")


class Ends(Protocol):
    """What has two ends: an estimate, or the lowest and the highest of several values."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def format_interval(interval: Ends | Mapping[str, float], spell: Spell) -> str:
    """`1.40 to 1.52`; of an interval without ends (one text only) that it is not known."""
    ends = (interval["low"], interval["high"]) if isinstance(interval, Mapping) else (interval.low, interval.high)
    return " to ".join(map(spell, ends)).replace("×", "") if _known(ends) else "not known"


def format_interval_short(interval: Ends, spell: Spell) -> str:
    """The same in brief, of what is never negative: `1.40–1.52`, `39–45%`; nothing where all of it is beyond exp."""
    words = format_interval(interval, spell)
    return "" if interval.low >= UNBOUNDED else words.replace("% to ", "–").replace(" to ", "–")


def format_perplexity(x: float) -> str:
    """Three digits; a value that `exp_capped` capped is only said to be larger."""
    return "over 1e304" if x >= UNBOUNDED else format_number(x)


def _known(ends: Sequence[float]) -> bool:
    """Whether an interval has ends; an infinite one of nats is 0 to exp(700) as perplexity."""
    return all(map(math.isfinite, ends)) and not (ends[0] == 0 and ends[1] >= UNBOUNDED)


def join_words(words: Sequence[str], most: int = 4) -> str:
    """`a`, `a and b`, `a, b and c`; more than `most` end in `and 3 more`."""
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def format_share(x: float) -> str:
    """`88%`."""
    return f"{x:.0%}".replace("-", "−")


def format_correlation(x: float) -> str:
    """A correlation, two decimals."""
    return f"{x:.2f}".replace("-", "−")


# -- numbers and words -------------------------------------------------------------------------------------------------


def format_number(x: float | None, unit: str = "") -> str:
    """Three significant digits, four from 1,000 to 9,999, then k, M, G, T, then powers; `–` for what is not known."""
    if x is None:
        return "–"
    gap = " " if unit else ""
    if not math.isfinite(x) or x == 0 or (isinstance(x, int) and abs(x) < 1000):
        return f"{x:g}{gap}{unit}".replace("inf", "∞")
    size = abs(float(f"{x:.3g}"))
    if size >= 1e15 or size < 1e-6:
        return f"{x:.2e}"
    if 1000 <= size < 10_000 and not unit:
        return f"{x:,.0f}"
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= s), (1.0, ""))
    digits = max(0, 2 - math.floor(math.log10(size / scale)))
    return f"{x / scale:.{digits}f}{gap}{prefix}{unit}".replace("-", "−")


def format_ratio(x: float) -> str:
    """A ratio, two decimals."""
    return f"×{x:.2f}" if abs(x) < 100 else f"×{format_number(x)}"


def percentage_points(x: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * x:+.1f}pp".replace("-", "−")


def stem(path: str) -> str:
    """The name of a file without folder and endings."""
    return path.rsplit("/", 1)[-1].partition(".")[0]


def in_brackets(ends: Sequence[float], spell: Callable[[float], str] = format_number) -> str:
    """`(1.40–1.52)`; of ends with signs `(−1.0pp to +0.3pp)`."""
    low, high = map(spell, ends)
    between = " to " if low[:1] in "+−" else "–"
    return f"({low}{between}{high})".replace("×", "")


def with_interval(estimate: Estimate, spell: Callable[[float], str] = format_number) -> str:
    """`871 (867–896)`."""
    return f"{spell(estimate.value)} {in_brackets((estimate.low, estimate.high), spell)}"


def pluralize(n: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def token_facts(info: TokenSetInfo) -> dict[str, Any]:
    """What a token set is made of, by name: a task has items, text has documents and texts."""
    left_out = ("items",) if info.items is None else ("documents", "texts")
    return {name: value for name, value in asdict(info).items() if name not in left_out}


def count_items(info: TokenSetInfo) -> str:
    """`40 items` of a task, `38 documents` of text."""
    return pluralize(info.documents, "document") if info.items is None else pluralize(info.items, "item")


def reliability_note(estimate: Estimate) -> str:
    """On what an interval rests that is not reliable, in words; nothing for one that is."""
    if estimate.reliable:
        return ""
    from billhook.core.statistics import FEW_CLUSTERS

    n, many = estimate.clusters, f"and is to be relied on from {FEW_CLUSTERS}"
    words: dict[Reason, str] = {
        "": f"Few documents: the interval rests on {n} texts only and is not reliable.",
        "few_texts": f"Few documents: the interval rests on {n} texts, {many} texts on.",
        "one_text": f"Few documents: the interval rests on {n} documents of one text, {many} texts on.",
        "few_items": f"Few items: the interval rests on {n} items, {many} items on.",
        "few_runs": f"Few runs: the interval is the range of {n} runs; from 6 on it holds with 95% confidence.",
    }
    return words[estimate.reason]


def format_duration(seconds: float) -> str:
    """`59.9 s`, `6 min 40 s`, `23 h 59 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def verification_sentence(found: Verification | None) -> str:
    """Return how an export does in the runtime that serves it."""
    if found is None:
        return "Not verified: the runtime that serves it did not run it."
    texts = f", {found.texts} texts tokenised alike" if found.texts is not None else ""
    return (
        f"Verified in {found.runtime} {found.version}: KL {found.kl:.2g} nats on average and {found.worst:.2g} at most "
        f"over {found.positions} tokens, {found.agreement:.0%} of the most likely tokens agree, {found.generated} of "
        f"{found.of} greedy tokens until the first that differs{texts}."
    )


def shown_ratio(first: Estimate, second: Estimate, ratio: Estimate) -> Estimate:
    """The ratio of the medians that are shown, with the interval of the runs in pairs, which it widens to itself."""
    shown = second.value / first.value
    return replace(ratio, value=shown, low=min(ratio.low, shown), high=max(ratio.high, shown))


def speed_change(first: Estimate, second: Estimate, ratio: Estimate) -> str:
    """`×1.16 (1.10–1.21)`: the ratio of the medians shown, with the interval of the runs in pairs.

    Where the interval includes 1, or leaves out the ratio, the difference is noise, and is called so.
    """
    shown = shown_ratio(first, second, ratio)
    ends = f"{format_ratio(shown.low)}–{format_ratio(shown.high)}"
    told = ratio.low <= shown.value <= ratio.high and not ratio.low <= 1 <= ratio.high
    return f"{format_ratio(shown.value)} ({ends})" + ("" if told else ", noise")
