"""A chat template is a program of somebody else's: it ends, in bounded memory, or the model is refused."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from billhook.core.errors import ModelError
from billhook.data import chat_templates
from billhook.data.chat_templates import render_chat
from billhook.models.load import load

CHAT = [{"role": "user", "content": "w1 w2"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    LOOPS: "takes more than 1 s",
    "{{ 'x' * 10000000000 }}": "more memory",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "takes more",
    "{{ 'x'.ljust(10000000000) }}": "more memory",
    "{{ 'x' | center(10000000000) }}": "more memory",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "more memory",
    "{{ 9 ** 9 ** 9 ** 9 }}": "computes powers",
    "{{ 'x' * 100000000 }}": "100,000,000 characters|takes more",
}


@pytest.fixture
def tokenizer(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(chat_templates, "SECONDS", 1.0)
    return load(model).tokenizer


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_does_not_end_is_refused(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    before, start = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    with pytest.raises(ModelError, match=HOSTILE[template]):
        render_chat(tokenizer, CHAT)
    assert time.monotonic() - start < 10
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_it_is_stopped_in_any_thread_and_later_ones_are_not(tokenizer: Any) -> None:
    told: list[str] = []

    def run() -> None:
        tokenizer.chat_template = LOOPS
        with pytest.raises(ModelError, match="takes more than 1 s"):
            render_chat(tokenizer, CHAT)
        tokenizer.chat_template = "{{ messages[0].content }}**"
        told.append(render_chat(tokenizer, CHAT))
        time.sleep(1.2)
        told.append("whole")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert told == ["w1 w2**", "whole"]


def test_what_a_template_raises_passes_and_options_reach_it(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %} go{% endif %}"
    assert render_chat(tokenizer, CHAT, add_generation_prompt=True) == "w1 w2 go"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Exception, match="roles must alternate"):
        render_chat(tokenizer, CHAT)
