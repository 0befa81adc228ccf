"""What may be in a site's reply, to the last header: names, shapes, sizes, figures and words.

`filters` knows which tensors a method lets travel. Here a whole reply is compared with the task
that asked for it. Nothing passes because it looks harmless: a header, a meta entry, a figure or a
shape passes because it is one that this task's reply has.

| part | passes |
|---|---|
| fields | the headers, the DXO |
| headers of FLARE | return code, task name and id, cookies as the task set them, short ids |
| headers of ours | what the task said, exactly; a reason of `site.reasons` |
| DXO of `train` | float32 tensors by name and shape, coded bytes no larger, or sealed bytes |
| meta of `train` | the spec of these tensors, the task's round, a weight, the report's figures |
| DXO of `validate` | scores of the models asked for, cases numbered, no other text |
| an error | its return code and its reason, and nothing else |

With `encryption: he` nothing but sealed bytes passes. What values the tensors have is not judged: a
program at the site that means harm can hide data in the numbers themselves. The gate holds where
only the site's own code runs (BYOC off).
"""

from __future__ import annotations

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.shareable import Shareable

from flap_nvflare.flare import messages
from flap_nvflare.flare.asked import Asked, same, short
from flap_nvflare.flare.filters import DXO_KEYS, ENVELOPE, check_dxo, read_body
from flap_nvflare.flare.header_check import check_headers
from flap_nvflare.flare.reports import read_scores
from flap_nvflare.flare.weights_check import check_weights
from flap_nvflare.settings import Federation
from flap_nvflare.training.scores import ON_REQUEST, SiteScore


def check_reply(reply: Shareable, asked: Asked, max_update_mb: float) -> None:
    """Whether a reply with data may leave the site.

    Raises:
        ContentBlockedException: naming the first thing that may not.
    """
    if type(reply) is not Shareable:
        raise ContentBlockedException(f"a reply of type {type(reply).__name__}")
    for key in reply:
        if key not in ENVELOPE | DXO_KEYS:
            raise ContentBlockedException(f"field {short(key)} may not travel")
    check_headers(reply, asked)
    body = reply.get("DXO")
    if body is None:
        return
    if type(body) is not dict or not set(body) <= {"kind", "data", "meta"}:
        raise ContentBlockedException("the DXO has other fields than kind, data and meta")
    if asked.federation is None:
        raise ContentBlockedException("the task had no settings to judge a reply by")
    dxo, kind = read_body(reply), _KINDS.get(asked.task)
    if kind is None or dxo.data_kind != kind:
        raise ContentBlockedException(f"a DXO of kind {short(dxo.data_kind)} to {asked.task!r}")
    if kind == DataKind.METRICS:
        check_dxo(dxo, asked.federation.method, parameters=asked.federation.parameters)
        _check_scores(dxo, asked, asked.federation)
    else:
        check_weights(dxo, asked, asked.federation, max_update_mb)


_KINDS = {
    messages.TRAIN: DataKind.WEIGHTS,
    messages.SUBMIT_MODEL: DataKind.WEIGHTS,
    messages.VALIDATE: DataKind.METRICS,
}


def _check_scores(dxo: DXO, asked: Asked, federation: Federation) -> None:
    if dxo.meta:
        raise ContentBlockedException("meta of scores is empty")
    data, names = dxo.data, tuple(federation.class_names)
    if type(data) is not dict or not set(data) <= set(asked.models):
        raise ContentBlockedException("scores of other models than the task's")
    try:
        read_scores(data, asked.site[0] if asked.site else "", tuple(data), names)
        for splits in data.values():
            if not set(splits) <= {"test", "validation"}:
                raise ContentBlockedException("scores of another split")
            for split, value in splits.items():
                _check_score(value, split, asked)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ContentBlockedException(f"scores: {error}") from error


def _check_score(value: object, split: str, asked: Asked) -> None:
    """Written anew from its cases a score is the same: no name, no field, no figure is another."""
    found = SiteScore.from_dict(value)  # type: ignore[arg-type]
    plain = found.site in asked.site and found.split == split
    if not plain or any(getattr(case, name) for case in found.cases for name in ON_REQUEST):
        raise ContentBlockedException("a score of another site or with other figures")
    if not same(found.numbered().to_dict(), value):
        raise ContentBlockedException("a score has more in it than the figures of numbered cases")
