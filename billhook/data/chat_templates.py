"""Chat templates, which are programs of whoever made the model: run bounded in time and size."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2

from billhook.core.errors import ModelError
from billhook.core.results.json_form import JsonObject

SECONDS = 10.0  # that a template may take for one chat
BYTES = 2**30  # that the process may grow meanwhile
LONGEST = 2**26  # characters of what it writes
_ADVICE = "Give text without chats, or bring another chat_template.jinja."
_ONE_AT_A_TIME = threading.Lock()


class _TakesTooLong(BaseException):
    """Raised inside a template that runs too long; no `except Exception` of a library stops it."""


def render_chat(tokenizer: Any, chat: Sequence[JsonObject], **options: Any) -> str:
    """What a tokenizer's chat template makes of the messages of one chat.

    Raises ModelError where it takes more than 10 seconds, a gigabyte, or writes 64 million characters; what the
    template itself raises passes.
    """
    _check_powers(tokenizer)
    try:
        with _ONE_AT_A_TIME, _bounded_size(), _bounded_time():
            text = str(tokenizer.apply_chat_template(list(chat), tokenize=False, **options))
    except _TakesTooLong:
        raise ModelError(f"The model's chat template takes more than {SECONDS:.0f} s for one chat. {_ADVICE}") from None
    except (MemoryError, RecursionError) as error:
        raise ModelError(f"The model's chat template takes more memory than a chat can need. {_ADVICE}") from error
    if len(text) > LONGEST:
        raise ModelError(f"The model's chat template makes {len(text):,} characters of one chat. {_ADVICE}")
    return text


def _check_powers(tokenizer: Any) -> None:
    """Raises ModelError for a template with powers: one of large numbers never ends, and nothing can stop it."""
    told = getattr(tokenizer, "chat_template", None)
    for template in told.values() if isinstance(told, dict) else [told]:
        if isinstance(template, str) and "**" in template:
            try:
                tokens = list(jinja2.Environment().lex(template))
            except jinja2.TemplateError:
                continue  # which says so itself, where it is used
            if any(kind == "operator" and value == "**" for _, kind, value in tokens):
                raise ModelError(f"The model's chat template computes powers (**), which no chat needs. {_ADVICE}")


@contextmanager
def _bounded_size() -> Iterator[None]:
    """Let the process take no more than a gigabyte, where the system can say so."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(pages.read_text().split()[0]) * resource.getpagesize() + BYTES
    allowed = min(each for each in (limit, soft, hard) if each != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _bounded_time() -> Iterator[None]:
    """Raise _TakesTooLong in this thread when the time is over."""
    thread, turn, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop() -> None:
        with turn:
            if not over.is_set():
                raise_in(thread, ctypes.py_object(_TakesTooLong))

    timer = threading.Timer(SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with turn:
            over.set()
            raise_in(thread, None)  # what came in the last moment
        timer.cancel()
