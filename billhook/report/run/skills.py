"""What pruning did to skills: rows, and a warning for each that is lost."""

from __future__ import annotations

from billhook.core.results.run import RunResult, SkillChange
from billhook.report.frame import caption, html_table, whole_spans
from billhook.report.numbers import format_accuracy, format_nats, format_points, with_interval

SKILL_COLUMNS = ("Skill", "Questions", "By guessing", "Teacher", "Student", "Points", "Log-probability of the answer")


def skill_rows(result: RunResult) -> list[tuple[str, ...]]:
    """Return every tested skill, under `SKILL_COLUMNS`."""
    return [
        (
            each.skill,
            f"{each.change.n:,}",
            f"{each.chance:.0%}",
            format_accuracy(each.teacher),
            format_accuracy(each.student),
            with_interval(each.change, format_points),
            f"{format_nats(each.teacher_nats)} → {format_nats(each.student_nats)}, "
            f"{with_interval(each.nats, format_nats)}",
        )
        for each in result.skills
    ]


def lost_skills(result: RunResult) -> str:
    """Return a sentence for every skill that is lost; empty where the questions show none."""
    return " ".join(_lost(each) for each in result.skills if each.lost)


def _lost(each: SkillChange) -> str:
    ends = f"{format_points(each.change.low)} to {format_points(each.change.high)} points"
    return (
        f"{each.skill.capitalize()} breaks: it falls from {each.teacher:.0%} to {each.student:.0%} right ({ends}; "
        f"guessing gets {each.chance:.0%})."
    )


def skills_html(result: RunResult) -> str:
    """Return the table of the skills, and how to read it; nothing where none was tested."""
    if not result.skills:
        return ""
    table = whole_spans(html_table(SKILL_COLUMNS, skill_rows(result)))
    words = (
        "Questions made from a seed, each with one right choice; in brackets 95% intervals, in pairs. The "
        "log-probability, in nats, is what the right choice has among the choices: it shows a loss before an answer "
        "turns. A skill counts as broken where the interval of the points and a test that allows for all skills say so."
    )
    return f'<div class="tight">{table}</div>{caption(words)}'
