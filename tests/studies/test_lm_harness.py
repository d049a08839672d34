"""Code of a task file of the harness is not run unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

import billhook
from billhook.core.errors import DataError
from billhook.studies.lm_harness import require_no_code

PLAIN = 'task: mine\ndataset_path: json\ndoc_to_text: "{{query}}"\n'
RUNS = {
    "doc_to_text: !function mine.text\n": "!function",
    "class: !function mine.Task\n": "!function",
    "metric_list:\n- metric: !function mine.score\n": "!function",
    "x: !!python/object/apply:os.system [ls]\n": "!!python/object/apply:os.system",
    "x: !unheard of\n": "!unheard",
    "metric_list:\n- metric: mine\n  hf_evaluate: true\n": "hf_evaluate",
    'doc_to_target: "{{ \'\'[\\"\\\\x5f_class\\\\x5f_\\"] }}{{ query.__class__ }}"\n': "__ in a template",
    "doc_to_target: \"{{ query |attr('x') }}\"\n": "attr in a template",
}


@pytest.mark.parametrize("text", RUNS)
def test_what_would_run_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(PLAIN + text)
    with pytest.raises(DataError) as caught:
        require_no_code(file, trusted=False)
    assert [each for each in (str(file), RUNS[text], "trust_remote_code=True") if each not in str(caught.value)] == []
    require_no_code(file, trusted=True)


def test_what_is_included_or_bears_the_name_counts_and_other_files_do_not(tmp_path: Path) -> None:
    file, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    file.write_text(PLAIN)
    other.write_text("task: another\ndoc_to_text: !function mine.text\n")
    require_no_code(file, trusted=False)
    for text in (f"{PLAIN}include: other.yaml\n", "group: mine\ntask:\n- another\n"):
        file.write_text(text)
        with pytest.raises(DataError, match=r"other\.yaml holds !function"):
            require_no_code(file, trusted=False)
    file.write_text(PLAIN)
    other.write_text("task: mine\ndoc_to_text: !function mine.text\n")
    with pytest.raises(DataError, match=r"other\.yaml holds !function"):
        require_no_code(file, trusted=False)
    other.write_text("x: !!python/name:os.system\n")
    with pytest.raises(DataError, match=r"other\.yaml holds !!python/name:os\.system"):
        require_no_code(file, trusted=False)


def test_a_study_refuses_it_before_anything_runs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef text(doc): return ''\n")
    (tmp_path / "mine.yaml").write_text(PLAIN + "doc_to_text: !function code.text\n")
    with pytest.raises(DataError, match="!function"):
        billhook.evaluate_tasks(model, f"lmeval:{tmp_path / 'mine.yaml'}", store=tmp_path / "b.db")
    assert not (tmp_path / "ran").exists()
