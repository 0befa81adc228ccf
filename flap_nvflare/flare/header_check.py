"""The headers of a reply: FLARE's own and ours, each by its name and its value."""

from __future__ import annotations

import re
from typing import Any

from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from flap_nvflare.flare import messages
from flap_nvflare.flare.asked import Asked, is_number, same, short
from flap_nvflare.site.reasons import CODE, NUMBERS, REASONS, fields

RETURN_CODES = frozenset(
    value for name, value in vars(ReturnCode).items() if not name.startswith("_")
)
_ID = re.compile(r"[0-9A-Za-z_.:-]{0,64}")


def check_headers(reply: Shareable, asked: Asked) -> None:
    """Every header by its name and value.

    Raises:
        ContentBlockedException: naming the first that may not travel.
    """
    if ReservedKey.TASK_NAME in reply and reply[ReservedKey.TASK_NAME] != asked.task:
        raise ContentBlockedException("the task's name is another one")
    headers = reply.get(ReservedHeaderKey.HEADERS)
    if headers is not None and type(headers) is not dict:
        raise ContentBlockedException("the headers are no dict")
    for name, value in (headers or {}).items():
        if not _header_passes(name, value, asked):
            raise ContentBlockedException(f"header {short(name)} may not travel, or not so")


def _header_passes(name: object, value: object, asked: Asked) -> bool:
    if name in (ReservedHeaderKey.COOKIE_JAR, messages.FEDERATION, messages.RUN, messages.TURNED):
        return value is None or same(value, asked.headers.get(str(name)))
    if name == ReservedHeaderKey.RC:
        return type(value) is str and value in RETURN_CODES
    if name == ReservedHeaderKey.TASK_NAME:
        return type(value) is str and value == asked.task
    if name == ReservedHeaderKey.TASK_ID:
        return type(value) is str and value == asked.task_id
    if name == ReservedHeaderKey.CONTENT_TYPE:
        return type(value) is str and value == "DXO"
    if name in (ReservedHeaderKey.AUDIT_EVENT_ID, ReservedHeaderKey.MSG_ROOT_ID):
        return value is None or (type(value) is str and _ID.fullmatch(value) is not None)
    if name == ReservedHeaderKey.MSG_ROOT_TTL:
        return value is None or is_number(value)
    return name == messages.REASON and _reason_passes(value)


def _reason_passes(value: object) -> bool:
    if type(value) is not dict or not set(value) <= {CODE, NUMBERS}:
        return False
    code, numbers = value.get(CODE), value.get(NUMBERS, {})
    if type(code) is not str or code not in REASONS or type(numbers) is not dict:
        return False
    return set(numbers) <= set(fields(code)) and all(map(is_number, numbers.values()))


def bare_error(reply: object, asked: Asked, code: str = "") -> dict[str, Any]:
    """The headers that an error reply keeps: its code, its reason, and FLARE's own.

    Args:
        reply: the reply, of whatever content.
        asked: the task.
        code: another return code in place of the reply's.
    """
    found = reply.get(ReservedHeaderKey.HEADERS) if isinstance(reply, dict) else None
    kept = {
        name: value
        for name, value in (found if type(found) is dict else {}).items()
        if name not in (messages.FEDERATION, messages.RUN, messages.TURNED)
        and name != ReservedHeaderKey.CONTENT_TYPE
        and _header_passes(name, value, asked)
    }
    known = kept.get(ReservedHeaderKey.RC, ReturnCode.EXECUTION_EXCEPTION)
    return {**kept, ReservedHeaderKey.RC: code or known}
