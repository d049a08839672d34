"""How Billhook fails.

    BillhookError                exit  what it means
    ├── UsageError                2    the command, the recipe or the plan is wrong
    │   ├── BudgetError                the budget cannot be read, or cannot be met
    │   ├── PlanError                  the plan names sites that do not exist, or removes too much
    │   ├── RecipeError                a recipe with an unknown, repeated or contradicting key
    │   ├── UnknownName                a method, model row or option that does not exist
    │   ├── MissingExtra               an optional package is not installed
    │   ├── RunError                   no such run, a finished one, or one of another process
    │   └── ResultError                a stored result that this version cannot read
    ├── RefusedError              3    the model or the data must not be used
    │   ├── ModelError                 a checkpoint that is damaged, foreign, quantised, unknown …
    │   ├── DataError                  calibration or evaluation text that cannot be used
    │   ├── EndpointError              a server that cannot be reached, or refuses a request
    │   └── FingerprintError           a file made for another model, tokenizer or data
    ├── GateFailed                4    a student is worse than a gate allows, or may be
    └── ResourceError             5    the machine lacks memory or disk

Every message says what was wrong, what is allowed and what to type next: parameters in Python, flags on the command
line. It names both by `option`.
"""

from __future__ import annotations

import difflib
import errno
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

_EITHER = re.compile("\x0e([^\x0e-\x10]*)\x0f([^\x0e-\x10]*)\x10")  # what `either` puts into a message


def either(python: str, command_line: str) -> str:
    """Words of a message that are others in Python than on the command line."""
    return f"\x0e{python}\x0f{command_line}\x10"


def option(name: str, value: object = None) -> str:
    """An option in a message, `eval_data='FILE'` in Python and `--eval-data FILE` on the command line.

    Without a value `eval_data=`, or `--eval-data`; True is a flag alone; a mapping is `NAME=VALUE`, a list has commas.
    """
    flag = "--" + name.replace("_", "-")
    if value is None:
        return either(f"{name}=", flag)
    if isinstance(value, Mapping):
        typed = " ".join(f"{flag} {shlex.quote(f'{key}={each}')}" for key, each in value.items())
    elif value is True:
        typed = flag
    else:
        typed = f"{flag} {shlex.quote(','.join(map(str, value)) if isinstance(value, list) else str(value))}"
    return either(f"{name}={value!r}", typed)


def in_python(message: str) -> str:
    """A message for who calls a function."""
    return visible(_EITHER.sub(r"\1", message))


def on_command_line(message: str) -> str:
    """A message for who typed a command."""
    return visible(_EITHER.sub(r"\2", message))


_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """A text in which what a terminal would obey instead of show stands escaped, such as \\x1b or \\u202e.

    Control characters but line ends and tabs, marks of direction, what has no width, and halves of surrogate pairs: a
    name of somebody else's may hold them.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class BillhookError(Exception):
    """The root of the tree. `exit_code` is what the command line returns; `message` is for both readers."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(in_python(message))
        self.message = message


class UsageError(BillhookError):
    """The command, the recipe or the plan is wrong; nothing was computed."""

    exit_code = 2


class BudgetError(UsageError):
    """A budget that cannot be read or cannot be met."""


class PlanError(UsageError):
    """A plan that names sites which do not exist, or removes required ones."""


class RecipeError(UsageError):
    """A recipe with an unknown, repeated or contradicting key, or a value of the wrong kind."""


class RunError(UsageError):
    """A run that does not exist, is finished, or is in use by another process."""


class ResultError(UsageError):
    """A stored result of another schema, or one that is incomplete."""


class UnknownName(UsageError):
    """A name that is not registered. The message gives the nearest one."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        choices = sorted(known)
        near = nearest(name, choices)
        guess = f" Did you mean {near!r}?" if near else ""
        super().__init__(f"There is no {kind} called {name!r}.{guess} Known: {', '.join(choices)}.{hint}")


class MissingExtra(UsageError):
    """An optional package is missing. The message holds the line that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package. Install it with: pip install 'billhook[{extra}]'")


class RefusedError(BillhookError):
    """The model or the data is not usable as it is."""

    exit_code = 3


class ModelError(RefusedError):
    """A checkpoint that Billhook will not read."""


class DataError(RefusedError):
    """Text that cannot be used for calibration or evaluation."""


class EndpointError(RefusedError):
    """A server that cannot be reached, or refuses a request."""


class FingerprintError(RefusedError):
    """A file made for another model, tokenizer, data or recipe."""


class GateFailed(BillhookError):
    """A student is worse than a gate allows, or too few items say that it is not."""

    exit_code = 4


class ResourceError(BillhookError):
    """The machine lacks memory or disk."""

    exit_code = 5


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_SQLITE = (8, 10, 13)  # read-only, I/O error, full
_RUST = re.compile(rf"\(os error ({'|'.join(map(str, _UNWRITABLE))})\)")  # as safetensors and tokenizers say it


def cannot_write(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, says that a disk is full or broken, or takes nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            return True
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE:
            return True
        if _RUST.search(str(error)) or "PytorchStreamWriter failed writing" in str(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


@contextmanager
def writing(again: str = "run it again") -> Iterator[None]:
    """Raise ResourceError where what is done inside cannot write. `again`: how to go on when it can."""
    try:
        yield
    except BillhookError:
        raise
    except Exception as error:
        if not cannot_write(error):
            raise
        raise ResourceError(
            f"The disk cannot be written: {error}. What was measured is kept. Free some space, or mend the disk, then "
            f"{again}."
        ) from error


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, or None if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
