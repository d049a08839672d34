"""Chats as people keep them, and the text that a model's chat template makes of one."""

from __future__ import annotations

from typing import Any

from billhook.core.errors import DataError, ModelError
from billhook.core.results.json_form import JsonObject
from billhook.data.chat_templates import render_chat
from billhook.data.rows import UnusableRow

CHAT_FIELDS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # of `from`, where the roles have other names
CHAT_EXAMPLE = '[{"role": "user", "content": "…"}, …]'


def chat_text(messages: list[Any], tokenizer: Any, source: str, number: int) -> str:
    """The text of a chat by the template of `tokenizer`; `number`: its row in `source`.

    Raises DataError for what is no chat, and UnusableRow for one that the template does not take.
    """
    where = f"{source}, row {number},"
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{source} holds chats, and this model's tokenizer has no chat template.")
    if not messages:
        raise UnusableRow(f"{where} holds a chat without messages. Leave it out.")
    chat = [_message(message, f"{where} message {i},") for i, message in enumerate(messages, 1)]
    text = _rendered(chat, tokenizer, where)
    if any(message["content"] is None for message in chat):
        blank = _rendered([message | {"content": message["content"] or ""} for message in chat], tokenizer, where)
        if text.count("None") > blank.count("None"):  # the template spells it out
            return blank
    return text


def _rendered(chat: list[JsonObject], tokenizer: Any, where: str) -> str:
    try:
        return render_chat(tokenizer, chat)
    except ModelError:
        raise
    except Exception as error:  # a template is a program of the model's, and fails in its own words
        reason = str(error).strip().split("\n")[0][:200].rstrip(".")
        raise UnusableRow(
            f"{where} is refused by the model's chat template: {reason or type(error).__name__}. Leave the row out, or "
            "change its messages."
        ) from error


def _message(message: Any, where: str) -> JsonObject:
    """A message with `role` and `content`. The content is None only beside calls of tools."""
    if not isinstance(message, dict):
        raise DataError(f"{where} is no message. A chat is {CHAT_EXAMPLE}.")
    named = ("role", "content") if "role" in message else ("from", "value")
    role, content = (message.get(name) for name in named)
    role = ROLES.get(str(role), role) if named[0] == "from" else role
    if not isinstance(role, str):
        raise DataError(f"{where} has no role. A chat is {CHAT_EXAMPLE}.")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is None and not message.get("tool_calls"):
        raise UnusableRow(f"{where} has no {named[1]}. Leave the row out, or give it a text.")
    if not isinstance(content, str | None):
        raise DataError(f"{where} has {str(content)[:60]!r} as its {named[1]}. Give a text.")
    rest = {name: value for name, value in message.items() if name not in named}
    return message | {"content": content} if named[0] == "role" else {"role": role, "content": content, **rest}


def _part(part: Any, where: str) -> str:
    """The text of one part of a content."""
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
        raise DataError(f"{where} has a part of the kind {kind!r}, which is no text. Leave such rows out.")
    return text
