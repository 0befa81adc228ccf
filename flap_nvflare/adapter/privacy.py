"""Differential privacy at the site: the Gaussian mechanism on what a site sends, and its epsilon.

Before a site's tensors leave it, their difference to what the site started from, all tensors as
one vector u, is cut to length C (`clip`) and blurred:

    sent = start + u min(1, C / |u|) + N(0, (z C)^2 I)            z = `noise`

(Dwork and Roth 2014, Gaussian mechanism; clipped model updates: McMahan et al., arXiv
1710.06963). The server gets nothing else, so nobody need trust it: this is local privacy.

**Unit.** Whatever the update depends on: the site's whole data. Its scans may change in any way,
one case or all of them, and each round's message is still drawn from nearly the same
distribution. One case has at least that protection; there is no tighter figure for it.

**Neighbours and sensitivity.** Two clipped vectors are at most 2 C apart, so `replace` (the site's
data against any other data) has the multiplier z / 2. `zero_out` (the site's data against none,
an update of zero) moves the vector by C at most and has the multiplier z. The server sees who
takes part, so `replace` is the relation that is reported; `zero_out` is the smaller figure that
papers on users' privacy call add or remove.

**Rounds.** A site that takes part in k of T rounds has released k messages: count messages, not
rounds of the federation, and those that the server refused or a resumed run repeated as well.
No amplification by sampling is claimed, since the server knows whom it asked. Losses add up over
all runs on the same data; `Releases` keeps the count at the site.

**Cost.** The noise has length z C sqrt(d) for d numbers, the update C at most: with d in the
hundred thousands a z that gives a small epsilon buries any one site's update, and a mean over K
sites takes only sqrt(K) off it. A small rank, frozen A and many sites make it bearable. `secret`
in a report says that nobody can subtract the noise, not that there is enough of it: read epsilon.

**Not covered.** Whatever leaves the site beside the tensors: the weight (a count of cases or
slices), the report's loss, Dice, counts and seconds, the scores of the cross-site evaluation, and
that the site takes part. Choose `weight_by: equal` and hold the figures back where they matter.

**After the noise** anything may follow without cost: compression with its error feedback,
encryption, every rule. Before it only clipping counts. Noise on both factors of B A meets itself
in the product; with A frozen (rule `ffa`) it stays linear (Sun et al., arXiv 2403.12313).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from flap_nvflare.adapter.update import write_atomic

UNIT = "all data of one site"  # what a message may reveal at most so much of
RELATIONS = ("replace", "zero_out")
_CHUNK = 1 << 18  # numbers drawn at once: 8 MB of random bytes for each of their halves


class PrivacyError(ValueError):
    """The mechanism can't run or be accounted for; the message names the value and the mend."""


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism on a site's update.

    Args:
        clip: largest L2 norm C of the difference, positive.
        noise: standard deviation of the noise as a multiple of `clip`; 0 clips only.
        seed: None for noise from the operating system's secure source, which nobody can draw
            again. A number gives the same noise each time: for tests and experiments, since
            whoever knows it subtracts the noise. It protects nothing, and `statement` says so.
    """

    clip: float
    noise: float
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise PrivacyError(f"dp_clip: {self.clip!r} is not allowed; give a positive number")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise PrivacyError(f"dp_noise: {self.noise!r} is not allowed; give zero or more")

    @property
    def secret(self) -> bool:
        """Whether there is noise that nobody can draw again."""
        return self.noise > 0 and self.seed is None

    def release(
        self, start: Mapping[str, Tensor], trained: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What may leave the site in the place of `trained`.

        Args:
            start: what the site started the round from, known to the server.
            trained: the same names and shapes after training.

        Returns:
            Tensors sorted by name in the dtypes of `trained`, on its devices.

        Raises:
            PrivacyError: if names or shapes differ, or a value is not finite.
        """
        moves = _differences(start, trained)
        length = math.sqrt(math.fsum(float(move.square().sum()) for move in moves.values()))
        share = min(1.0, self.clip / length) if length > 0 else 1.0
        random = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        sent = {}
        for name, move in moves.items():
            blurred = move * share
            if self.noise > 0:
                blurred += self.noise * self.clip * _normal(move.numel(), random).view(move.shape)
            value = start[name].detach().cpu().double() + blurred
            sent[name] = value.to(trained[name].device, trained[name].dtype)
        return sent

    def statement(self, releases: Mapping[float, int], delta: float) -> dict[str, Any]:
        """What a report may claim after `releases` (messages by noise), this one among them.

        Epsilons are None where they are infinite: if this message, or one before it on the same
        data, had no secret noise.
        """
        found = {one: composed_epsilon(releases, delta, one) for one in RELATIONS}
        secret = self.secret and all(map(math.isfinite, found.values()))
        return {
            "clip": self.clip,
            "noise": self.noise,
            "releases": sum(releases.values()),
            "delta": delta,
            "unit": UNIT,
            "secret": secret,
            **{f"epsilon_{one}": value if secret else None for one, value in found.items()},
        }


def epsilon(noise: float, rounds: int, delta: float, relation: str = "replace") -> float:
    """Epsilon of `rounds` messages; see `composed_epsilon`."""
    return composed_epsilon({noise: rounds}, delta, relation)


def composed_epsilon(
    releases: Mapping[float, int], delta: float, relation: str = "replace"
) -> float:
    """Epsilon at `delta` of all messages that a site has sent, by the Renyi accountant.

    Gaussian mechanisms compose adaptively by adding their Renyi divergences (Mironov, arXiv
    1702.07476), which become (epsilon, delta) as in Canonne et al., arXiv 2004.00010.

    Args:
        releases: number of messages by noise multiplier z.
        delta: probability with which epsilon may fail, in (0, 1).
        relation: `replace` or `zero_out`; see the module.

    Returns:
        Epsilon; 0 without messages, infinite if any had no noise.

    Raises:
        PrivacyError: on a value out of range, or without the package `dp-accounting`.
    """
    if relation not in RELATIONS:
        raise PrivacyError(f"relation {relation!r}: expected one of {RELATIONS}")
    if not 0 < delta < 1:
        raise PrivacyError(f"dp_delta: {delta!r} is not allowed; give a number between 0 and 1")
    for noise, count in releases.items():
        if not (math.isfinite(noise) and noise >= 0):
            raise PrivacyError(f"dp_noise: {noise!r} is not allowed; give zero or more")
        if type(count) is not int or count < 0:
            raise PrivacyError(f"{count!r} messages with noise {noise}: give a count")
    sent = {noise: count for noise, count in sorted(releases.items()) if count}
    if not sent or 0 in sent:
        return math.inf if sent else 0.0
    accounting, rdp = _accountant()
    accountant = rdp.RdpAccountant()
    for noise, count in sent.items():
        event = accounting.GaussianDpEvent(noise / 2 if relation == "replace" else noise)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


class Releases:
    """A site's own count of the messages it has sent, by noise multiplier, in a JSON file.

    One file for all runs on the same data. `add` is called before a message leaves: a kill in
    between counts a message too many, never one too few.

    Args:
        path: the file; it need not exist yet.

    Raises:
        PrivacyError: if the file is there and is none of these.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts = self._read()

    @property
    def counts(self) -> dict[float, int]:
        """Messages by noise multiplier."""
        return {float(noise): count for noise, count in sorted(self._counts.items())}

    def add(self, noise: float) -> int:
        """Counts one more message, on the disk when this returns; all of this noise so far."""
        key = str(float(noise))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._path}.lock"):  # two jobs on the same data may send at a time
            self._counts = self._read()
            self._counts[key] = self._counts.get(key, 0) + 1
            write_atomic(self._path, json.dumps(self._counts, sort_keys=True).encode())
        return self._counts[key]

    def _read(self) -> dict[str, int]:
        if not self._path.is_file():
            return {}
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(float(noise)): int(count) for noise, count in values.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise PrivacyError(
                f"{self._path}: no count of messages ({error}); restore it from a backup: without "
                "it the privacy that was spent is unknown"
            ) from error


def _differences(start: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """trained - start in float64 on the CPU, sorted by name."""
    for name in sorted(set(start) ^ set(trained)):
        place = "start" if name in start else "trained tensors"
        raise PrivacyError(f"{name!r} is only among the {place}; give both the same names")
    moves = {}
    for name in sorted(trained):
        before, after = start[name].detach().cpu(), trained[name].detach().cpu()
        if before.shape != after.shape:
            raise PrivacyError(
                f"{name!r} has shape {tuple(after.shape)}, it started as {tuple(before.shape)}"
            )
        moves[name] = after.double() - before.double()
        if not bool(torch.isfinite(moves[name]).all()):
            raise PrivacyError(f"{name!r} holds nan or infinity; train again at a lower rate")
    return moves


def _normal(count: int, random: torch.Generator | None) -> Tensor:
    """Standard normal float64 numbers, secure if there is no generator."""
    if random is not None:
        return torch.randn(count, generator=random, dtype=torch.float64)
    numbers = torch.empty(count, dtype=torch.float64)
    for first in range(0, count, _CHUNK):
        part = numbers[first : first + _CHUNK]
        # Sums of four draws: the low bits of one draw tell which floats it can't have been, and
        # with them the value below the noise (Holohan and Braghin, arXiv 2107.10138).
        part.copy_(torch.stack([_secure_normal(part.numel()) for _ in range(4)]).sum(0) / 2)
    return numbers


def _secure_normal(count: int) -> Tensor:
    """Box and Muller's transform of the operating system's random bytes."""
    pairs = (count + 1) // 2
    words = torch.frombuffer(bytearray(os.urandom(16 * pairs)), dtype=torch.int64)
    # 53 bits each, in (0, 1]: no logarithm of zero.
    uniform = ((words >> 11) & ((1 << 53) - 1)).double().add_(1).mul_(2.0**-53)
    radius = (-2 * uniform[:pairs].log()).sqrt()
    angle = 2 * math.pi * uniform[pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _accountant() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise PrivacyError(
            "epsilon needs the package dp-accounting: pip install 'flap_nvflare[privacy]'"
        ) from error
    return dp_accounting, rdp
