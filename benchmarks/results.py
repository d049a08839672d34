"""Writes docs/results.md from what benchmarks/methods.py measured. No number is typed in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from billhook.core.plan import PARTS as MODEL_PARTS
from billhook.core.results.studies import Outcome, SweepResult, TrialResult
from billhook.report.study_words import fraction_kept, gap_to_best, tasks_of, texts_of

SIZES = ("10%", "20%", "30%")
PARTS = (*SIZES, "draws", "calibration", "mixture", "regret")
OTHERS = ("recovery", "width")
HEAD = """# Results

Written by `methods.py`, `recovery.py` and `width.py` in `benchmarks/` from what they measured; no number in here is
typed in.

"""


def page(measured: Path, scaled: Mapping[str, Any]) -> str:
    """The page, from the results of the parts that the folder `measured` holds."""
    files = {part: measured / f"{part.removesuffix('%')}.json" for part in (*PARTS, *OTHERS)}
    found = {part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()}
    sections = [HEAD]
    if sweeps := [SweepResult.from_json(found[size]) for size in SIZES if size in found]:
        trials, refused = (tuple(each for s in sweeps for each in getattr(s, what)) for what in ("trials", "refused"))
        whole = replace(sweeps[0], trials=trials, refused=refused)
        sizes = dict.fromkeys(trial.remove for trial in trials)
        sections += [_setting(whole, scaled), _winners(whole), *(_size(whole, remove) for remove in sizes)]
    sections += [_draws(_drawn(found["draws"]))] if "draws" in found else []
    sections += [_calibration(SweepResult.from_json(found["calibration"]))] if "calibration" in found else []
    sections += [_mixture(_drawn(found["mixture"]))] if "mixture" in found else []
    sections += [_regret(found["regret"]["rows"])] if "regret" in found else []
    sections += [_recovery(found["recovery"])] if "recovery" in found else []
    sections += [_width(found["width"])] if "width" in found else []
    if missing := [part for part in (*PARTS, *OTHERS) if part not in found]:
        sections.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(sections)


def _drawn(told: Mapping[str, Any]) -> list[tuple[int, SweepResult]]:
    """(seed, sweep) of every draw."""
    return [(draw["seed"], SweepResult.from_json(draw["sweep"])) for draw in told["draws"]]


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _name(source: str) -> str:
    """`c4`, `wikitext2`, `piqa`, of a path; `c4 + self` of a mixture."""
    return " + ".join(Path(piece).name.partition(".")[0].partition("_")[0] for piece in source.split("+"))


def _setting(sweep: SweepResult, scaled: Mapping[str, Any]) -> str:
    calibration, where = sweep.calibration[0], sweep.environment
    told = [
        f"Model: {sweep.model}, {sweep.sizes.parameters:,} parameters, in float32, on {where.machine}, "
        f"torch {where.torch}. Calibration: "
        f"{calibration.tokens:,} tokens of {_name(calibration.source)} in {calibration.sequences} rows, the "
        "same for every recipe, from texts that no evaluation sees. The published sizes stand in the recipes; other "
        "settings are as published, except for these, so that a search takes about ten minutes on two cores:\n",
    ]
    told += [f"- {name}: {_words(values)}" for name, values in scaled.items()]
    told += ["\nHeld out:\n"]
    for name, info in sweep.evaluation.items():
        items = f"{info.items} items"
        what = items if info.items is not None else f"{info.tokens:,} tokens of {info.texts} texts"
        outcome = sweep.teacher[name]
        told.append(f"- {_name(name)}: {what}; the unpruned model has {outcome.kind} {_value(outcome)}")
    told.append(
        "\nIntervals are 95%, over texts or items. *Above best*: nats per token above the lowest row of the "
        "same size on that text, paired; an interval that holds 0 means that the two are not told apart. No model was "
        "trained after pruning. *Search* and *site evaluations* are what a size took beyond what the smaller sizes of "
        "the same recipe had measured; *more than* where a search was interrupted, and its beginning is not counted.\n"
    )
    return "\n".join(told)


def _words(values: Mapping[str, Any]) -> str:
    flat = {
        k: v for key, value in values.items() for k, v in (value.items() if isinstance(value, dict) else [(key, value)])
    }
    return ", ".join(f"{key} = {str(value).lower()}" for key, value in flat.items())


def _value(outcome: Outcome) -> str:
    text = outcome.kind == "perplexity"
    ends = (outcome.estimate.value, outcome.estimate.low, outcome.estimate.high)
    middle, low, high = (f"{(1 if text else 100) * min(x, 1e6):,.1f}" for x in ends)
    return f"{middle} ({low}–{high})" if text else f"{middle}% ({low}–{high})"


def _gap(trial: TrialResult, text: str) -> str:
    gap = trial.results[text].above_best
    if gap is None:
        return ""
    if gap.value == 0:
        return "**best**"
    return f"{gap.value:.3f} ({gap.low:.3f}–{gap.high:.3f})"


def _left(sweep: SweepResult, trial: TrialResult) -> str:
    return f"{fraction_kept(sweep, trial):.1%}"


def _size(sweep: SweepResult, remove: str) -> str:
    texts, tasks = texts_of(sweep), tasks_of(sweep)
    trials = [trial for trial in sweep.trials if trial.remove == remove]
    trials.sort(key=lambda trial: math.fsum(trial.results[text].nats or 0.0 for text in texts))
    head = ["recipe", "att + mlp", "params", "KV"]
    head += [cell for text in texts for cell in (f"{_name(text)} perplexity", "above best")]
    head += [_name(task) for task in tasks] + ["search", "site evaluations"]
    lines = []
    for trial in trials:
        parts = " + ".join(str(trial.count(part)) for part in MODEL_PARTS)
        left = [_left(sweep, trial), f"{fraction_kept(sweep, trial, 'kv_bytes_per_token'):.1%}"]
        line = [f"`{trial.recipe}`", parts, *left]
        line += [cell for text in texts for cell in (_value(trial.results[text]), _gap(trial, text))]
        line += [_value(trial.results[task]) for task in tasks]
        more = "more than " if trial.resumed else ""
        lines.append([*line, f"{more}{trial.search_seconds:,.0f} s", f"{more}{trial.site_evaluations:,.0f}"])
    told = f"## {remove.removesuffix('params')} of the parameters\n\n{_markdown(head, lines)}"
    refused = [each for each in sweep.refused if each.remove == remove]
    return told + "".join(f"\n`{each.recipe}` is missing: {each.reason}\n" for each in refused)


def _winners(sweep: SweepResult) -> str:
    """For each size and text, which recipes are best or not told apart from the best."""
    lines = []
    for remove in dict.fromkeys(trial.remove for trial in sweep.trials):
        for text in texts_of(sweep):
            gaps = {trial.recipe: gap_to_best(trial, text) for trial in sweep.trials if trial.remove == remove}
            best = min(gaps, key=lambda name: gaps[name].value)
            near = [name for name, gap in gaps.items() if name != best and gap.low <= 0]
            ours = gaps.get("billhook-depth")
            told = "" if ours is None else "best" if best == "billhook-depth" else f"{ours.value:.3f} above"
            lines.append(
                [remove.removesuffix("params"), _name(text), f"`{best}`", ", ".join(map(_code, near)) or "none", told]
            )
    head = ["size", "text", "lowest loss", "not told apart from it", "`billhook-depth`"]
    return f"## Who has the lowest loss\n\n{_markdown(head, lines)}"


def _code(name: str) -> str:
    return f"`{name}`"


def _draws(draws: Sequence[tuple[int, SweepResult]]) -> str:
    lines = []
    for seed, sweep in draws:
        texts = texts_of(sweep)
        for trial in sweep.trials:
            cells = [cell for text in texts for cell in (_value(trial.results[text]), _gap(trial, text))]
            lines.append([str(seed), f"`{trial.recipe}`", _left(sweep, trial), *cells])
    head = ["seed", "recipe", "params"] + [c for text in texts for c in (f"{_name(text)} perplexity", "above best")]
    return f"## Other draws of the calibration text\n\n{_markdown(head, lines)}"


def _calibration(sweep: SweepResult) -> str:
    texts = list(sweep.teacher)
    lines = []
    for trial in sweep.trials:
        cells = (_value(trial.results[text]) for text in texts)
        lines.append([_name(trial.data), _left(sweep, trial), *cells])
    head = ["calibrated on", "params", *(f"{_name(text)} perplexity" for text in texts)]
    return f"## The default recipe on other calibration texts\n\n{_markdown(head, lines)}"


def _mixture(draws: Sequence[tuple[int, SweepResult]]) -> str:
    """What it changes that the model writes half of the calibration text."""
    lines = []
    for seed, sweep in draws:
        texts = list(sweep.teacher)
        for trial in sweep.trials:
            cells = []
            for text in texts:
                gap = trial.results[text].above_first_text
                change = f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})" if gap else ""
                cells += [_value(trial.results[text]), change]
            lines.append([str(seed), _name(trial.data), _left(sweep, trial), *cells])
    head = ["seed", "calibrated on", "params"]
    head += [cell for text in texts for cell in (f"{_name(text)} perplexity", "change")]
    return (
        "## Calibration text that the model writes\n\nThe default recipe on as many tokens, all of a text or half of "
        "them the model's own writing; a seed is a draw of both. *Change*: nats per token, paired, against the text "
        f"alone, with the 95% interval.\n\n{_markdown(head, lines)}"
    )


def _regret(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [row["search"], f"{row['loss']:.4f}", f"{row['regret']:.4f}",
         f"{row['site_evaluations']:,.0f}", f"{row['seconds']:,.0f} s"]
        for row in sorted(rows, key=lambda row: row["regret"])
    ]  # fmt: skip
    return (
        "## Regret against the optimum\n\n4 of the 16 sites of blocks 11 to 18, the others protected; KL on the 512 "
        "calibration tokens that the searches saw, so that this is about the search and not about the text. The "
        "searches share what is measured, in the order of this table: *site evaluations* and *search time* are what "
        "each took beyond those before it.\n\n"
        + _markdown(["search", "loss", "regret, nats", "site evaluations", "search time"], lines)
    )


def _recovery(told: Mapping[str, Any]) -> str:
    """What every chain of recoveries brought back, text by text and task by task."""
    rows, names = told["rows"], list(told["evaluation"])
    if not rows:
        return ""
    first = next(iter(rows.values()))["on"]
    head, bare = ["recovery"], ["none"]
    for name in names:
        text = first[name]["kind"] == "perplexity"
        head += (
            [f"{_name(name)} perplexity", "gap closed", "against none"] if text else [f"{_name(name)}", "against none"]
        )
        bare += [_one(first[name], "before"), "", ""] if text else [_one(first[name], "before"), ""]
    lines = [[*bare, "", "", ""]]
    for chain, row in rows.items():
        line = [f"`{chain.partition('+')[0]}`" + (", mixed text" if "+" in chain else "")]
        for name in names:
            on = row["on"][name]
            closed = [] if on["kind"] != "perplexity" else [f"{on['closed']:.0%}"]
            line += [_one(on, "after"), *closed, _change(on)]
        lines.append([*line, f"{row['parameters']:,}", f"{row['tokens']:,}", f"{row['seconds']:,.0f} s"])
    dense = ", ".join(f"{_name(name)} {_one(first[name], 'dense')}" for name in names)
    return (
        f"## Recovery\n\n{len(told['removed'])} of 60 sites removed by the default recipe, calibrated on C4. What "
        f"recoveries learn from is text that no evaluation sees. Unpruned: {dense}. *Gap closed*: of the perplexity "
        "that pruning added. *Against none*: nats per token, or share of the items, paired, with the 95% interval. "
        "*Mixed text*: C4 and WikiText-2 in equal parts.\n\n"
        + _markdown([*head, "parameters added", "tokens wanted", "time"], lines)
        + _curves({chain: row for chain, row in rows.items() if row.get("curve")})
        + (_in_search(told["in_search"]) if "in_search" in told else "")
    )


def _in_search(told: Mapping[str, Any]) -> str:
    """A fold after the search against one that the search has judged plans by."""
    head = ["fold", "sites", "parameters left", "search"]
    head += [cell for name in told["on"] for cell in (_name(name), "change")]
    lines = []
    for which, side in (("before", "after the search"), ("after", "in the search too")):
        line = [side, f"{len(told[side]['removed'])}", f"{told[side]['parameters']:,}"]
        line.append(f"{told[side]['search_seconds']:,.0f} s")
        for on in told["on"].values():
            line += [_one(on, which), _change(on) if which == "after" else ""]
        lines.append(line)
    return (
        f"\nGreedy searches on {told['tokens']:,} tokens of C4, both plans folded at the end. *Change*: nats per "
        "token, or share of the items, paired, with the 95% interval.\n\n" + _markdown(head, lines)
    )


def _curves(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How the trainings went on: the best validation loss by the share of their time."""
    if not rows:
        return ""
    shares = (0.25, 0.5, 0.75, 1.0)
    lines = []
    for chain, row in rows.items():
        curve, minutes = row["curve"], row["minutes"]
        (begin, first), (end, _) = curve[0], curve[-1]
        reached = [
            [best for seconds, best in curve if seconds <= begin + share * (end - begin)][-1] for share in shares
        ]
        line = [f"`{chain}`", f"{minutes:g} min", f"{first:.4f}", *(f"{best:.4f}" for best in reached)]
        lines.append([*line, f"{end - begin:,.0f} s"])
    head = [
        "training",
        "at most",
        "first",
        *(f"{share:.0%} of the time" for share in shares),
        "until the last better one",
    ]
    return (
        "\nThe loss that a training lowers, of validation texts that it does not learn from, in nats per token: what "
        "still falls at the end lacks time, what does not lacks text or room.\n\n" + _markdown(head, lines)
    )


def _width(told: Mapping[str, Any]) -> str:
    """Depth against width against both: losses without and with a refit, then times."""
    sections = [
        "## Depth against width\n\nEvery recipe calibrated on the same "
        f"{told['tokens']:,} tokens of C4, without a recovery and with `fold` on {told['fold_tokens']:,} tokens of C4. "
        "`billhook-depth` removes whole sites, `billhook-joint` chooses how much of every site stays, the others let "
        "heads and neurons go. *Refitted*: with `fold`, and the paired change against none in nats per token, or in "
        "share of the items, with its 95% interval.\n",
        "![Perplexity by parameters that stay, without a recovery and with fold](width.svg)\n",
    ]
    for size in sorted({what.partition("/")[0] for what in told["rows"]}):
        rows = {what.partition("/")[2]: row for what, row in told["rows"].items() if what.startswith(f"{size}/")}
        names = list(next(iter(rows.values()))["on"])
        head = ["recipe", "gone + narrower", "params"]
        head += [cell for name in names for cell in (_name(name), "refitted")]
        lines = []
        for name, row in rows.items():
            line = [f"`{name}`", f"{len(row['removed'])} + {len(row['narrowed'])}"]
            line.append(f"{row['parameters'] / told['whole']:.1%}")
            for source in names:
                on = row["on"][source]
                line += [_one(on, "before"), f"{_one(on, 'after')}, {_change(on)}"]
            lines.append(line)
        sections.append(f"### {size} of the parameters\n\n{_markdown(head, lines)}")
        sections += [_pairs(told["pairs"][size])] if told["pairs"][size] else []
        sections += [_times(size, told["speed"][size])] if size in told["speed"] else []
    sections += [_options(told["options"])] if "options" in told else []
    return "\n".join(sections)


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> str:
    """A recipe against the best of those that it is meant to beat."""
    lines = []
    for pair in pairs:
        word = "lower" if pair["high"] < 0 else "higher" if pair["low"] > 0 else "not told apart"
        with_ = "`fold`" if pair["when"] == "after" else "none"
        lines.append([f"`{pair['recipe']}`", f"`{pair['rival']}`", _name(pair["text"]), with_, _change(pair), word])
    head = ["recipe", "against", "text", "recovery", "nats per token", "so its loss is"]
    return f"In pairs over texts, each against the best of those that it is meant to beat:\n\n{_markdown(head, lines)}"


def _options(found: Sequence[Mapping[str, Any]]) -> str:
    """Other settings of a recipe against the rival that it is meant to beat, which comes first."""
    names = list(dict.fromkeys(each["text"] for each in found))
    lines = []
    for recipe in dict.fromkeys(each["recipe"] for each in found):
        own = {each["text"]: each for each in found if each["recipe"] == recipe}
        cells = [f"{own[name]['perplexity']:.1f}, {_change(own[name])}" for name in names]
        lines.append([f"`{recipe}`", *cells])
    return (
        f"### What was tried for `saap`\n\nPerplexity without a recovery, and what it loses more than "
        f"`{found[0]['recipe']}`, in nats per token, paired over texts.\n\n"
        f"{_markdown(['recipe', *map(_name, names)], lines)}"
    )


def _times(size: str, found: Mapping[str, Any]) -> str:
    """Tokens a second of every model at every batch size, and how many times faster than the unpruned one."""
    batches = list(next(iter(found.values())))
    head = ["", *(f"{kind}, batch {batch}" for batch in batches for kind in ("prefill", "decode")), "peak memory"]
    lines = []
    for name, by_batch in found.items():
        line = [f"`{name}`" if name != "unpruned" else name]
        for batch in batches:
            for kind in ("prefill", "decode"):
                rate, times = by_batch[batch][f"{kind}_tokens_per_s"], by_batch[batch]["ratio"][kind]
                more = f", ×{times['median']:.2f} ({times['low']:.2f}–{times['high']:.2f})"
                line.append(f"{rate['median']:,.0f}" + ("" if name == "unpruned" else more))
        peaks = [each["peak_bytes"] for each in by_batch.values() if each["peak_bytes"]]
        lines.append([*line, f"{max(peaks) / 1e6:,.0f} MB" if peaks else ""])
    return (
        f"Tokens per second at {size}, timed in turn: the median, and the ratio to the unpruned model in pairs, with "
        f"the 95% interval of the median.\n\n{_markdown(head, lines)}"
    )


def _change(on: Mapping[str, Any]) -> str:
    return f"{on['change']:+.3f} ({on['low']:+.3f} to {on['high']:+.3f})"


def _one(on: Mapping[str, Any], which: str) -> str:
    return f"{on[which]:.1f}" if on["kind"] == "perplexity" else f"{on[which]:.1%}"
