"""The settings of a federation and of a site: small, typed, validated when made.

A federation's settings travel with the job and with every task; nothing in them is code.
A site's settings stay on the site's disk. Which parameters train is `sam.tuning`'s matter,
which rules exist is `aggregation`'s: here both are names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ARCHITECTURES = ("vit_t", "vit_b", "vit_l", "vit_h")
METHODS = (
    "full",
    "attention",
    "decoder",
    "partial_decoder",
    "lora",
    "lora_decoder",
    "flap",
)
# In the place of the two: a network of the sites' own bundle, and what of it trains, by name.
OWN_NETWORK = "bundle"
NAMED = "named"
CHECKPOINT_VARIABLE = "FLAP_SAM_CHECKPOINT"
BUNDLE_VARIABLE = "FLAP_BUNDLE_NETWORK"
DATA_VARIABLE = "FLAP_DATA_ROOT"
SOURCE_VARIABLE = "FLAP_DATA_SOURCE"
HOME_VARIABLE = "FLAP_HOME"
RESUME_VARIABLE = "FLAP_RESUME"
SWITCHES = ("auto", "on", "off")
# The switches of a site: how its hardware runs the network.
HARDWARE = ("checkpointing", "channels_last", "packed", "compile")


# Names may end in paths, logs and tables, here and at other sites.
_NAME = re.compile(r"\w[\w .+()-]{0,63}")
_NAMES = "of letters, digits, blanks and _-.+() in at most 64 characters"
_MOST_CLASSES = 255  # labels are bytes, and 0 is the background
# No other wildcard than `*`: then a pattern that another one matches, as text, names no more.
_PATTERN = re.compile(r"[A-Za-z0-9_.*]{1,200}")
_MOST_PATTERNS = 64
PATTERNS = f"a list of 1 to {_MOST_PATTERNS} names of letters, digits, '_', '.' and '*'"


def own_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this package keeps what is its user's: FLAP_HOME, else `.flap_nvflare` at home."""
    return Path(environment.get(HOME_VARIABLE) or Path.home() / ".flap_nvflare")


class SettingsError(ValueError):
    """A setting is missing, unknown or out of range; the message names it and the mend."""


class MissingDataError(SettingsError):
    """The site names no scans."""


class OtherBaseError(SettingsError):
    """The base model is not the one that the site accepts."""


@dataclass(frozen=True)
class Federation:
    """What all sites of a federation agree on. The defaults are the demo's.

    Attributes:
        arch: SAM backbone, one of `ARCHITECTURES`; or `bundle`, the network that each site's own
            bundle names on its own disk.
        base: `pretrained` (the packaged ViT-T, or the official file named by the site) or
            `random` (fresh weights from `seed`; the baseline without pre-training). With `bundle`
            `pretrained` is the file that `weights` names in the site's own.
        image_size: side of the square network input in pixels, divisible by the patch size.
        class_names: foreground classes in label order (label 1 first).
        method: which parameters train and travel, one of `METHODS`; with `bundle` it is `named`.
        parameters: with `named` the names of those parameters, `*` for any characters.
        rank: rank of every low-rank adapter.
        lora_blocks: the encoder's last blocks that have adapters; 0 for all. What comes before
            them never changes, and is computed once for each slice.
        rule: how updates are aggregated, one of `flap-nvflare rules`; `svd` is the paper's.
        gauge: basis of factors that a rule makes from products: `balanced`, `paper`, or `aligned`
            (turned back as near as can be to the adapter that the sites started from).
        moments: what happens to the optimisers' moments of factors whose basis has turned:
            `reset`, or `keep`.
        energy: share of a residual's squared norm that is sent; 1 for all of it.
        hostile: sites of which the robust rules assume the worst.
        site_ranks: rank by site, where the sites' ranks differ; those not named have `rank`,
            which is the largest.
        optimizer: how rounds become learning: `fedavg`, `fedprox`, `fednova`, `scaffold`,
            `fedavgm` (server momentum) or `fedadam`.
        proximal_weight: mu of `fedprox`'s penalty mu / 2 |x - x_global|^2.
        proximal_on: what x is there, and in Ditto's pull: `factors` (every trained tensor), or
            `products` (B A of an adapter, which has no basis; other tensors as they are).
        server_rate: rate of the server's step; with `fedadam` the size of a step of one number.
        server_momentum: decay of the server's first moment, with `fedavgm` and `fedadam`.
        personal: what each site keeps to itself: `none`, `head` (its own output layers), or
            `ditto` (a whole adapter of its own beside the shared one).
        ditto_weight: lambda of Ditto's pull towards the shared adapter.
        sites_per_round: sites drawn for each round; 0 for all.
        upload: what is done to an update on its way up, in this order; see `adapter.stages`.
        download: the same on the way down.
        dp_clip: largest L2 norm of what a site sends, with differential privacy; 0 for none.
        dp_noise: standard deviation of the noise as a multiple of `dp_clip`.
        dp_delta: delta of the (epsilon, delta) that is reported.
        encryption: `none` or `he` (homomorphic: the server sees sums only).
        rounds: rounds of the federation.
        local_epochs: passes over the site's slices in a round.
        batch_size: slices in a batch.
        learning_rate: base rate of AdamW.
        weight_decay: decoupled weight decay of AdamW.
        warmup_fraction: share of the federation's steps with a linearly rising rate.
        decay_power: p of the factor (1 - t / T)^p after the warm-up.
        dice_weight: weight of the soft Dice loss; cross entropy has the rest.
        foreground_fraction: expected share of drawn training slices that show a foreground class.
        loss_weighting: `none` (the loss of the slices as they are drawn) or `importance` (each
            slice counts by its uniform probability over the one it is drawn with, so that the
            expected loss is that of all the site's slices alike).
        channels: `repeat` (the paper: one slice three times) or `neighbours` (slice before,
            which is nearer the head, slice, slice after).
        grey_values: how grey values reach the network: `site` (CT: the window of a site's own
            training cases) or `scan` (MR, whose values have no unit: a window of each scan itself).
        augment: random flips, small affine maps and intensity changes while training.
        augment_views: 0 for a fresh random change at every draw; n for n fixed changed views of
            each slice, the same in all rounds, of which the draw takes one.
        validation_fraction: share of a site's training cases held out to choose the best round.
        weight_by: a site's weight in the aggregate: `cases`, `slices` or `equal`.
        precision: `fp32`, `bf16`, or `auto` (bf16 where the hardware computes in it).
        threads: threads of torch at each site on a CPU; fixed, for equal bytes at equal seeds, and
            one, since several sites on one machine with more slow each other down.
        seed: seed of everything random.
        min_sites: sites whose update must count for a round to stand; 0 means all of them.
        train_timeout: seconds a site may take for one round.
        straggler_wait: seconds that the server waits for the other sites once `min_sites`
            have answered.
        cross_site: models scored on every site's test cases at the end: `global` (last and
            best) or `all` (each site's last own model as well).
        tracking: where the server shows each round's figures while the run goes on, beside
            `rounds.jsonl`: `none`, `tensorboard` or `mlflow`. Nothing more leaves a site for it.
    """

    arch: str = "vit_t"
    base: str = "pretrained"
    image_size: int = 96
    class_names: tuple[str, ...] = ("kidney", "tumour")
    method: str = "flap"
    parameters: tuple[str, ...] = ()
    rank: int = 8
    lora_blocks: int = 0
    rule: str = "svd"
    gauge: str = "balanced"
    moments: str = "reset"
    energy: float = 1.0
    hostile: int = 1
    site_ranks: Mapping[str, int] = field(default_factory=dict)
    optimizer: str = "fedavg"
    proximal_weight: float = 0.01
    proximal_on: str = "factors"
    server_rate: float = 1.0
    server_momentum: float = 0.9
    personal: str = "none"
    ditto_weight: float = 0.1
    sites_per_round: int = 0
    upload: tuple[str, ...] = ()
    download: tuple[str, ...] = ()
    dp_clip: float = 0.0
    dp_noise: float = 0.0
    dp_delta: float = 1e-5
    encryption: str = "none"
    rounds: int = 3
    local_epochs: int = 2
    batch_size: int = 8
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    decay_power: float = 0.9
    dice_weight: float = 0.8
    foreground_fraction: float = 0.7
    loss_weighting: str = "none"
    channels: str = "repeat"
    grey_values: str = "site"
    augment: bool = True
    augment_views: int = 0
    validation_fraction: float = 0.25
    weight_by: str = "cases"
    precision: str = "fp32"
    threads: int = 1
    seed: int = 0
    min_sites: int = 0
    train_timeout: int = 3600
    straggler_wait: int = 600
    cross_site: str = "all"
    tracking: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {allowed}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            _require(low <= value <= high, name, value, f"a number from {low:g} to {high:g}")
        _require(
            0 < len(self.class_names) <= _MOST_CLASSES
            and all(map(_is_name, self.class_names))
            and len(set(self.class_names)) == len(self.class_names),
            "class_names",
            self.class_names,
            f"a list of 1 to {_MOST_CLASSES} different names, {_NAMES}",
        )
        self._require_one_network()
        _require(
            isinstance(self.rule, str) and self.rule.isidentifier(),
            "rule",
            self.rule,
            "the name of a rule: see flap-nvflare rules",
        )
        for site, rank in self.site_ranks.items():
            _require(_is_name(site), "site_ranks", site, f"names of sites, {_NAMES}")
            _require(
                type(rank) is int and 1 <= rank <= self.rank,
                f"site_ranks of {site}",
                rank,
                f"a whole number from 1 to rank, {self.rank}",
            )
        _require(
            self.loss_weighting == "none" or 0.0 < self.foreground_fraction < 1.0,
            "foreground_fraction",
            self.foreground_fraction,
            "a number between 0 and 1 with loss_weighting 'importance': what is never drawn has "
            "no weight",
        )

    def _require_one_network(self) -> None:
        own = self.arch == OWN_NETWORK
        _require(
            (self.method == NAMED) == own,
            f"method with arch {self.arch}",
            self.method,
            f"{NAMED!r}" if own else f"one of {METHODS}",
        )
        _require(
            are_patterns(self.parameters) if own else not self.parameters,
            f"parameters with arch {self.arch}",
            self.parameters,
            PATTERNS if own else f"none: the method names them; {NAMED!r} ones need arch: bundle",
        )

    @property
    def classes(self) -> int:
        """Number of foreground classes, C."""
        return len(self.class_names)

    def rank_of(self, site: str) -> int:
        """Rank of the site's adapters."""
        return self.site_ranks.get(site, self.rank)

    def weight_of(self, cases: int, slices: int) -> float:
        """Weight in the aggregate of a site with so many training cases and slices."""
        return float({"cases": cases, "slices": slices, "equal": 1}[self.weight_by])

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML hold; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        for name in ("class_names", "parameters", "upload", "download"):
            values[name] = list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Federation:
        """Checks names and types of every value.

        Raises:
            SettingsError: on an unknown name, a wrong type or a value out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        checked = {}
        for name, value in values.items():
            _require(name in fields, name, value, f"one of {tuple(fields)}", what="name")
            default = fields[name].default
            factory = fields[name].default_factory
            if factory is not dataclasses.MISSING:
                default = factory()
            checked[name] = _typed(name, value, default)
        return cls(**checked)

    @classmethod
    def whole(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings written by an earlier version, with those that it did not know yet.

        A new setting's default is what was done before there was one.
        """
        return {**cls().to_dict(), **values}

    @classmethod
    def load(cls, path: Path | str, environment: Mapping[str, str] = os.environ) -> Federation:
        """Reads `federation.yaml`: the profile's values, changed by those the file names.

        `profile: auto` is `paper` where FLAP_SAM_CHECKPOINT names an official checkpoint,
        `demo` otherwise.

        Raises:
            SettingsError: if the file is missing, no YAML mapping, or holds a bad value.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"{path}: cannot be read as YAML: {error}") from error
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: expected 'name: value' lines, found {values!r}")
        profile = values.pop("profile", "auto")
        try:
            return cls.of_profile(profile, values, environment)
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from error

    @classmethod
    def of_profile(
        cls,
        profile: str = "auto",
        changes: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> Federation:
        """The named profile's settings with `changes` on top."""
        _require(profile in ("auto", *PROFILES), "profile", profile, f"auto or {tuple(PROFILES)}")
        if profile == "auto":
            profile = "paper" if environment.get(CHECKPOINT_VARIABLE) else "demo"
        return cls.from_dict({**PROFILES[profile], **(changes or {})})


PROFILES: dict[str, dict[str, Any]] = {
    "demo": {},
    # arXiv 2407.21739 and its authors' code: ViT-B at 224, rank 32, 25 rounds of one epoch.
    "paper": {
        "arch": "vit_b",
        "image_size": 224,
        "rank": 32,
        "rounds": 25,
        "local_epochs": 1,
        "batch_size": 32,
        "learning_rate": 8e-4,
        "decay_power": 7.0,
        "precision": "auto",
        "train_timeout": 86400,
    },
}

# What a setting may be, by name: a site's own limits (`site.limits`) narrow it further.
CHOICES: dict[str, tuple[str, ...]] = {
    "arch": (*ARCHITECTURES, OWN_NETWORK),
    "base": ("pretrained", "random"),
    "method": (*METHODS, NAMED),
    "gauge": ("balanced", "paper", "aligned"),
    "moments": ("reset", "keep"),
    "optimizer": ("fedavg", "fedprox", "fednova", "scaffold", "fedavgm", "fedadam"),
    "proximal_on": ("factors", "products"),
    "personal": ("none", "head", "ditto"),
    "encryption": ("none", "he"),
    "loss_weighting": ("none", "importance"),
    "channels": ("repeat", "neighbours"),
    "grey_values": ("site", "scan"),
    "weight_by": ("cases", "slices", "equal"),
    "precision": ("auto", "fp32", "bf16"),
    "cross_site": ("global", "all"),
    "tracking": ("none", "tensorboard", "mlflow"),
}
RANGES: dict[str, tuple[float, float]] = {
    "image_size": (16, 4096),
    "rank": (1, 1024),
    "lora_blocks": (0, 32),
    "energy": (1e-6, 1.0),
    "hostile": (0, 100_000),
    "proximal_weight": (0.0, 1e6),
    "server_rate": (1e-8, 100.0),
    "server_momentum": (0.0, 0.9999),
    "ditto_weight": (0.0, 1e6),
    "sites_per_round": (0, 100_000),
    "dp_clip": (0.0, 1e6),
    "dp_noise": (0.0, 1e6),
    "dp_delta": (1e-12, 0.1),
    "rounds": (1, 100_000),
    "local_epochs": (1, 1000),
    "batch_size": (1, 4096),
    "learning_rate": (1e-8, 10.0),
    "weight_decay": (0.0, 1.0),
    "warmup_fraction": (0.0, 1.0),
    "decay_power": (0.0, 20.0),
    "dice_weight": (0.0, 1.0),
    "foreground_fraction": (0.0, 1.0),
    "augment_views": (0, 10_000),
    "validation_fraction": (0.0, 0.9),
    "threads": (1, 1024),
    "seed": (0, 2**31 - 1),
    "min_sites": (0, 100_000),
    "train_timeout": (1, 30 * 86400),
    "straggler_wait": (0, 30 * 86400),
}


@dataclass(frozen=True)
class Site:
    """What a site has on its own disk.

    Attributes:
        name: the site's name in the federation; also its name in its data.
        data_root: folder with the scans.
        checkpoint: official SAM file; empty for the packaged ViT-T or random weights.
        checkpoint_sha256: the only base accepted; empty accepts any.
        bundle: the site's own config of MONAI's with its network (`bundle.own_network`); None has
            none.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`.
        state_dir: folder for what must outlive a process: optimiser moments, and in `cache` the
            prepared scans.
        synthetic: whether the scans are phantoms of this package.
        data_source: the site's own file of code that lists its scans (`data.source`); None for
            a layout that is recognised (`data.layouts`).
        checkpointing, channels_last, packed, compile: how the hardware runs the network, each
            `auto`, `on` or `off`. The first and third are about SAM's encoder, and off without it.
        processes: processes that train a round together, one a GPU (`bundle.parallel`); 1 trains
            in the process that was asked. CUDA_VISIBLE_DEVICES chooses among the GPUs.
        own_process: whether a round trains in a process of its own also where `processes` is 1, so
            that its crash ends no more than the round: `on`, `off`, or `auto` (at a provisioned
            site, not in the simulator).
        cache_gb: bound of the folder of prepared scans in 10^9 bytes, 0 to keep none. A case
            takes 5 bytes for each slice and pixel of `image_size`: 50 MB for 200 slices at 224.
        workers: processes that change slices while the network trains; 0 does it in between.

    Raises:
        SettingsError: if a count is out of range, several processes share a numbered device, or a
            switch is none of `SWITCHES`.
    """

    name: str
    data_root: Path
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    bundle: Path | None = None
    device: str = "auto"
    state_dir: Path | None = None
    synthetic: bool = False
    data_source: Path | None = None
    checkpointing: str = "auto"
    channels_last: str = "auto"
    packed: str = "auto"
    compile: str = "auto"
    processes: int = 1
    own_process: str = "auto"
    cache_gb: float = 20.0
    workers: int = 0

    def __post_init__(self) -> None:
        _require(
            type(self.processes) is int and 1 <= self.processes <= 1024,
            "processes",
            self.processes,
            "a whole number from 1 to 1024",
        )
        _require(
            self.processes == 1 or ":" not in self.device,
            "device",
            self.device,
            f"cpu, cuda or auto where processes is {self.processes}: each has a GPU of its own",
        )
        for name in (*HARDWARE, "own_process"):
            value = getattr(self, name)
            _require(value in SWITCHES, name, value, f"one of {SWITCHES}")
        for name, (low, high) in {"cache_gb": (0.0, 1e6), "workers": (0, 256)}.items():
            value = getattr(self, name)
            _require(low <= value <= high, name, value, f"a number from {low:g} to {high:g}")


def are_patterns(values: Sequence[object]) -> bool:
    """Whether they may name parameters of a network, as `parameters` of a federation does."""
    return 0 < len(values) <= _MOST_PATTERNS and all(
        isinstance(value, str) and _PATTERN.fullmatch(value) for value in values
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def switch(value: object) -> str:
    """One of `SWITCHES` as a file may say it: YAML reads a bare on as true, off as false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _require(holds: bool, name: str, value: object, expected: str, what: str = "value") -> None:
    if not holds:
        shown = f"{name!r}" if what == "name" else f"{name}: {value!r}"
        shown = shown if len(shown) <= 300 else shown[:300] + "…"
        raise SettingsError(f"setting {shown} is not allowed; expected {expected}")


def _typed(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`; integers pass as floats, nothing else is converted."""
    if isinstance(default, tuple):
        _require(isinstance(value, (list, tuple)), name, value, "a list")
        return tuple(value)
    if isinstance(default, dict):
        _require(isinstance(value, Mapping), name, value, "lines of 'site: value'")
        return {str(key): entry for key, entry in value.items()}
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML reads 8e-4 as text
            return float(value)
    _require(type(value) is type(default), name, value, f"a value of type {type(default).__name__}")
    return value
