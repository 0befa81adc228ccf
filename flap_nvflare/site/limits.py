"""What a site lets a job ask of it: checked at the site, before anything of the job is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from flap_nvflare.settings import (
    CHOICES,
    METHODS,
    NAMED,
    PATTERNS,
    RANGES,
    Federation,
    SettingsError,
    are_patterns,
)
from flap_nvflare.site.reasons import SiteError

MB = 1_000_000
# All but `full`, which sends every weight of the network, and `named`, which needs names.
PLAIN_METHODS = tuple(method for method in METHODS if method != "full")
# Wide enough for the demo and for the paper (ViT-B at 224 px, rank 32, 25 rounds, batches of 32).
PLAIN_RANGES: Mapping[str, tuple[float, float]] = {
    "image_size": (16, 1024),
    "rank": (1, 256),
    "rounds": (1, 1000),
    "local_epochs": (1, 50),
    "batch_size": (1, 256),
    "learning_rate": (1e-8, 0.1),
    "augment_views": (0, 100),
    "threads": (1, 16),
    "train_timeout": (1, 7 * 86400),
}
_TEXTS = tuple(f.name for f in dataclasses.fields(Federation) if isinstance(f.default, str))


@dataclass(frozen=True)
class Limits:
    """The limits of one site.

    Attributes:
        min_cases: training cases, those held out for validation not counted, that the site must
            have to take part: an update made of few cases says much about each of them.
        max_update_mb: largest update in 10^6 bytes: its tensors as trained, before any coding,
            which makes them smaller, or encryption, which makes them larger.
        methods: the methods that may train here, and whose tensors may leave.
        parameters: with method `named` the names of parameters of this site's own network that may
            train here and leave, `*` for any characters.
        ranges: lowest and highest value by setting of `Federation`; for a setting that is not
            named, what `Federation` itself allows.
        choices: the allowed values by setting that is a word, such as `encryption: (he,)`.
        dp_clip: with a number above 0 only differentially private updates leave: their `dp_clip`
            may be at most this.
        dp_noise: the least `dp_noise` that they must have then.

    Raises:
        SettingsError: on an unknown name or a value out of range.
    """

    min_cases: int = 1
    max_update_mb: float = 64.0
    methods: tuple[str, ...] = PLAIN_METHODS
    parameters: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=lambda: dict(PLAIN_RANGES))
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dp_clip: float = 0.0
    dp_noise: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("min_cases", 1, 1_000_000),
            ("max_update_mb", 1e-6, 1e6),
            ("dp_clip", *RANGES["dp_clip"]),
            ("dp_noise", *RANGES["dp_noise"]),
        ):
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise _bad(name, value, f"a number from {low:g} to {high:g}")
        if type(self.min_cases) is not int:
            raise _bad("min_cases", self.min_cases, "a whole number")
        if self.dp_noise > 0 and self.dp_clip == 0:
            raise _bad("dp_noise", self.dp_noise, "a dp_clip above 0 beside it")
        known = CHOICES["method"]
        if not self.methods or not set(self.methods) <= set(known):
            raise _bad("methods", list(self.methods), f"a list of some of {list(known)}")
        if (self.parameters or NAMED in self.methods) and not are_patterns(self.parameters):
            raise _bad("parameters", list(self.parameters), f"{PATTERNS}, or no method 'named'")
        for name, pair in self.ranges.items():
            self._check_range(name, pair)
        for name, values in self.choices.items():
            self._check_choices(name, values)

    @staticmethod
    def _check_range(name: str, pair: tuple[float, float]) -> None:
        if name not in RANGES:
            raise _bad("ranges", name, f"the names of some of {list(RANGES)}")
        low, high = RANGES[name]
        if (
            len(pair) != 2
            or not all(_is_number(value) for value in pair)
            or not low <= pair[0] <= pair[1] <= high
        ):
            raise _bad(
                f"ranges.{name}", list(pair), f"[lowest, highest], both from {low:g} to {high:g}"
            )

    @staticmethod
    def _check_choices(name: str, values: tuple[str, ...]) -> None:
        if name not in _TEXTS or name == "method":
            names = [text for text in _TEXTS if text != "method"]
            raise _bad("choices", name, f"the names of some of {names}; methods are in 'methods'")
        known = CHOICES.get(name)
        if not values or not all(isinstance(value, str) for value in values):
            raise _bad(f"choices.{name}", list(values), "a list of at least one value")
        if known is not None and not set(values) <= set(known):
            raise _bad(f"choices.{name}", list(values), f"a list of some of {list(known)}")

    def check(self, federation: Federation) -> None:
        """Whether the site does what a job asks for.

        Raises:
            SiteError: `method_refused` or `setting_refused`; its text names the setting.
        """
        if federation.method not in self.methods:
            raise SiteError(
                "method_refused",
                f"method {federation.method!r} is not allowed here; limits.methods has "
                f"{list(self.methods)}",
            )
        for wanted in federation.parameters:
            if not any(fnmatchcase(wanted, allowed) for allowed in self.parameters):
                raise SiteError(
                    "method_refused",
                    f"parameters {wanted!r} are not allowed here; limits.parameters has "
                    f"{list(self.parameters)}",
                )
        for name, (low, high) in self.ranges.items():
            value = getattr(federation, name)
            if not low <= value <= high:
                raise _refused(name, value, f"a number from {low:g} to {high:g}", "ranges")
        for name, values in self.choices.items():
            if getattr(federation, name) not in values:
                raise _refused(name, getattr(federation, name), f"one of {list(values)}", "choices")
        if self.dp_clip > 0 and not (
            0 < federation.dp_clip <= self.dp_clip and federation.dp_noise >= self.dp_noise
        ):
            raise SiteError(
                "setting_refused",
                f"the job asks for dp_clip {federation.dp_clip:g} and dp_noise "
                f"{federation.dp_noise:g}; this site sends with dp_clip above 0 to "
                f"{self.dp_clip:g} and dp_noise from {self.dp_noise:g} (limits.dp_clip, dp_noise)",
            )

    def check_cases(self, cases: int) -> None:
        """Whether the site has enough training cases.

        Raises:
            SiteError: `too_few_cases`.
        """
        if cases < self.min_cases:
            raise SiteError(
                "too_few_cases",
                f"{cases} training cases, but limits.min_cases is {self.min_cases}",
                cases=cases,
                min_cases=self.min_cases,
            )

    def check_update(self, size: int) -> None:
        """Whether an update of `size` bytes may leave.

        Raises:
            SiteError: `update_too_large`.
        """
        if size > self.max_update_mb * MB:
            raise SiteError(
                "update_too_large",
                f"an update of {size / MB:.3f} MB, but limits.max_update_mb is "
                f"{self.max_update_mb:g}",
                update_mb=size / MB,
                max_update_mb=self.max_update_mb,
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML hold."""
        return {
            "min_cases": self.min_cases,
            "max_update_mb": self.max_update_mb,
            "methods": list(self.methods),
            "parameters": list(self.parameters),
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
            "choices": {name: list(values) for name, values in self.choices.items()},
            "dp_clip": self.dp_clip,
            "dp_noise": self.dp_noise,
        }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bad(name: str, value: object, expected: str) -> SettingsError:
    return SettingsError(f"limits.{name} is {value!r}; give {expected}")


def _refused(name: str, value: object, expected: str, place: str) -> SiteError:
    return SiteError(
        "setting_refused",
        f"the job's setting {name} is {value!r}; this site allows {expected} "
        f"(limits.{place}.{name})",
    )
