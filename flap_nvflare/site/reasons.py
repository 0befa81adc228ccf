"""Why a site could not do its work: a code and numbers for the others, text for its own log.

A site's errors name files, cases and folders. None of that may leave it. So an error becomes one
code of `REASONS` and a few numbers; the server makes a sentence of them for its administrator.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from string import Formatter
from types import MappingProxyType
from typing import Any

UNKNOWN = "unknown"

# Code: one sentence about the site, whose numbers the site sends along.
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "too_few_cases": "has {cases} training cases, its own file asks for {min_cases}",
        "data_missing": "can't use its scans, or has none; its own log names the file",
        "weights_missing": "lacks the file of the base model's weights",
        "weights_other": "has a base model that is damaged or is not the one that it accepts",
        "setting_refused": "refuses a setting of the job; its own log says which",
        "method_refused": "does not take part in the job's method",
        "update_too_large": "has an update of {update_mb} MB, its own file allows {max_update_mb}",
        "message_refused": "refused the server's message",
        "disk_full": "has no room left on its disk",
        "file_refused": "may not read or write one of its files; its own log names it",
        "state_damaged": "can't read what it kept of the last round; its own log names the file",
        "out_of_memory": "ran out of memory",
        "trainer_killed": "lost the process that trained (exit code {exit_code}; -9 is often for "
        "lack of memory)",
        "trainer_timeout": "stopped its training after {seconds} s, the job's train_timeout",
        "training_failed": "could not go on training; its own log says why",
        UNKNOWN: "failed for a reason that only its own log says",
    }
)
CODE, NUMBERS = "code", "numbers"
_LARGEST = 1e15


def fields(reason: str) -> tuple[str, ...]:
    """The numbers that a reason's sentence names, in their order."""
    return tuple(name for _, name, _, _ in Formatter().parse(REASONS[reason]) if name)


class SiteError(RuntimeError):
    """The site can't do the task, for one of the reasons that may be told.

    Args:
        reason: a key of `REASONS`; another one counts as `unknown`.
        text: everything there is to say, for the site's own log only.
        **numbers: those that the reason's sentence names; others and those that are no plain
            finite number are left out.
    """

    def __init__(self, reason: str, text: str = "", **numbers: float) -> None:
        super().__init__(text or reason)
        self.reason = reason if reason in REASONS else UNKNOWN
        self.numbers: Mapping[str, int | float] = _numbers(self.reason, numbers)

    def to_dict(self) -> dict[str, Any]:
        """All that may leave the site: {code, numbers}."""
        return {CODE: self.reason, NUMBERS: dict(self.numbers)}


def sentence(site: str, value: object) -> str:
    """One plain line for the administrator of what a site sent as its reason.

    Args:
        site: the site's verified name.
        value: whatever the site sent; its text is never shown.
    """
    return f"site {site} {predicate(value)}"


def predicate(value: object) -> str:
    """The same without the site's name: what is true of it."""
    reason, numbers = UNKNOWN, {}
    if isinstance(value, Mapping):
        code, sent = value.get(CODE), value.get(NUMBERS)
        if isinstance(code, str) and code in REASONS:
            reason = code
            numbers = _numbers(reason, sent if isinstance(sent, Mapping) else {})
    shown = {name: f"{numbers[name]:.6g}" if name in numbers else "?" for name in fields(reason)}
    return REASONS[reason].format(**shown)


def of_exception(error: BaseException) -> SiteError:
    """The reason of any error that a site's work may raise; its text is kept for the site's log."""
    if isinstance(error, SiteError):
        return error
    text = f"{type(error).__name__}: {error}"
    for one in _chain(error):
        if isinstance(one, SiteError):
            return SiteError(one.reason, text, **one.numbers)
        reason = _reason(one)
        if reason is not None:
            return SiteError(reason, text)
    return SiteError(UNKNOWN, text)


def of_kinds(kinds: Iterable[str], text: str) -> SiteError:
    """The same for an error of another process, of which its classes' names are known.

    Args:
        kinds: names of its class and of those above, then of the errors that it was raised from.
        text: for the site's own log.
    """
    return SiteError(_by_words(text) or _by_class(kinds) or UNKNOWN, text)


# By the name of the class: most of them are of rooms that this one does not import.
_BY_CLASS = {
    "MemoryError": "out_of_memory",
    "OutOfMemoryError": "out_of_memory",
    "PermissionError": "file_refused",
    "RefusedMessageError": "message_refused",
    "DataError": "data_missing",
    "MissingDataError": "data_missing",
    "MissingCheckpointError": "weights_missing",
    "OtherBaseError": "weights_other",
    "CheckpointError": "weights_other",
    "StateError": "state_damaged",
    "UpdateError": "state_damaged",
    "SettingsError": "setting_refused",
    "TrainingError": "training_failed",
}
_BY_ERRNO = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.ENOMEM: "out_of_memory",
    errno.EROFS: "file_refused",
}
# Errors of compiled code are of a plain class; these words are torch's, safetensors' and CUDA's.
_BY_WORDS = (
    ("no space left on device", "disk_full"),
    ("quota exceeded", "disk_full"),
    ("out of memory", "out_of_memory"),
    ("can't allocate memory", "out_of_memory"),
    ("cannot allocate memory", "out_of_memory"),
)


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return _BY_ERRNO[error.errno]
    return _by_words(str(error)) or _by_class(kind.__name__ for kind in type(error).__mro__)


def _by_words(text: str) -> str | None:
    text = text.lower()
    return next((reason for words, reason in _BY_WORDS if words in text), None)


def _by_class(names: Iterable[str]) -> str | None:
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__


def _numbers(reason: str, values: Mapping[Any, Any]) -> dict[str, int | float]:
    return {
        name: value
        for name, value in ((name, values.get(name)) for name in fields(reason))
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -_LARGEST <= value <= _LARGEST  # no NaN is
    }
