"""A round of training handed to other processes: the folder through which it goes and returns.

Tensors are safetensors, all else is JSON, every file is written whole or not at all. The
asking process holds a lock in the folder: once it is free, nobody waits for the result.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from flap_nvflare.adapter.update import UpdateError, load_update, save_update, write_atomic
from flap_nvflare.settings import Federation, Site
from flap_nvflare.training.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flap_nvflare.training.work import SiteWork, TrainReport

_PATHS = ("data_root", "state_dir", "data_source", "bundle")
_REQUEST = "request.json"
_REPORT = "report.json"
_FAILURE = "failure.json"
_PROGRESS = "progress.jsonl"
_LOCK = "asking.lock"
_OFFSET = "start_offset.safetensors"
_OFFSET_FORMAT = "flap_nvflare.offset.1"
_TERMS = "start_terms.safetensors"
_COLLECTED = "end_collected.safetensors"


@dataclasses.dataclass(frozen=True)
class Failure:
    """How a process failed.

    Attributes:
        rank: the process, from 0.
        what: its error, or the signal that ended it.
        at: time stamp in seconds.
        kinds: names of the classes of its error and of those below, the nearest first.
        exit_code: of a process that left no error; -n for signal n.
    """

    rank: int
    what: str
    at: float
    kinds: tuple[str, ...] = ()
    exit_code: int = 0


class RoundFolder:
    """The files of one round.

    Args:
        path: the folder, on the site's own disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = 0

    # ---- the asking side -----------------------------------------------------------------
    def lock(self) -> FileLock:
        """The lock to hold while waiting for the result; the kernel frees it with the process."""
        return FileLock(self.path / _LOCK)

    def ask(self, work: SiteWork, round_index: int) -> None:
        """Writes where `work` stands: settings, adapter, moments, base and local terms."""
        _save(work, self.path, "start")
        write_tensors(self.path / _OFFSET, work.network.offset, _OFFSET_FORMAT)
        work.terms.save(self.path / _TERMS)
        site = dataclasses.asdict(work.site)
        for name in _PATHS:
            site[name] = None if site[name] is None else str(site[name])
        self._write(
            _REQUEST, {"federation": work.federation.to_dict(), "site": site, "round": round_index}
        )

    def progress(self) -> Iterator[dict[str, Any]]:
        """What the first process has told since the last call."""
        path = self.path / _PROGRESS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._told)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._told += len(line)
                yield json.loads(line)

    def take(self, work: SiteWork) -> TrainReport:
        """Puts adapter, moments and collected gradients after the round into `work`.

        Raises:
            OSError, UpdateError, StateError or ValueError: if they are not there or do not fit.
        """
        from flap_nvflare.training.work import TrainReport

        report = TrainReport(**json.loads((self.path / _REPORT).read_text(encoding="utf-8")))
        _load(work, self.path, "end")
        work.terms.load_collected(self.path / _COLLECTED)
        return report

    # ---- the side that trains ------------------------------------------------------------
    def abandoned(self) -> bool:
        """Whether nobody waits for the result any more."""
        try:
            with self.lock().acquire(timeout=0):
                return True
        except Timeout:
            return False
        except OSError:  # the folder has gone
            return True

    def request(self) -> tuple[Federation, Site, int]:
        """Settings, site and round asked for."""
        values = json.loads((self.path / _REQUEST).read_text(encoding="utf-8"))
        site = values["site"]
        site["data_root"] = Path(site["data_root"])
        for name in _PATHS[1:]:
            site[name] = site[name] and Path(site[name])
        return Federation.from_dict(values["federation"]), Site(**site), int(values["round"])

    def start(self, work: SiteWork) -> None:
        """Puts adapter, moments, base and local terms before the round into `work`."""
        work.network.set_offset(read_tensors(self.path / _OFFSET, _OFFSET_FORMAT)[0])
        _load(work, self.path, "start")
        work.terms.load(self.path / _TERMS)

    def tell(self, figures: dict[str, Any]) -> None:
        """Adds a line to what `progress` reads."""
        with (self.path / _PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def answer(self, work: SiteWork, report: TrainReport) -> None:
        """Writes where `work` has come to, then the report, which makes the result count."""
        _save(work, self.path, "end")
        work.terms.save_collected(self.path / _COLLECTED)
        self._write(_REPORT, report.to_dict())

    # ---- failures ------------------------------------------------------------------------
    def fail(self, rank: int, error: BaseException) -> None:
        """Keeps the error of one process."""
        failure = Failure(
            rank, f"{type(error).__name__}: {error}", time.time(), tuple(_kinds(error))
        )
        self._write(f"rank_{rank}_{_FAILURE}", dataclasses.asdict(failure))

    def failures(self) -> list[Failure]:
        """The errors that processes have kept, the first to fail first."""
        found = [_read_failure(path) for path in self.path.glob(f"rank_*_{_FAILURE}")]
        return sorted(found, key=lambda failure: failure.at)

    def settle(self, failure: Failure) -> None:
        """Names the failure that ended the round."""
        self._write(_FAILURE, dataclasses.asdict(failure))

    def settled(self) -> Failure | None:
        """The failure that ended the round, if it is known."""
        path = self.path / _FAILURE
        return _read_failure(path) if path.exists() else None

    def _write(self, name: str, values: dict[str, Any]) -> None:
        write_atomic(self.path / name, json.dumps(values).encode("utf-8"))


def _read_failure(path: Path) -> Failure:
    values = json.loads(path.read_text(encoding="utf-8"))
    return Failure(**{**values, "kinds": tuple(values["kinds"])})


def _kinds(error: BaseException | None) -> Iterator[str]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield from (kind.__name__ for kind in type(error).__mro__)
        error = error.__cause__


def _save(work: SiteWork, folder: Path, when: str) -> None:
    save_update(folder / f"{when}_adapter.safetensors", work.adapter(), work.spec_whole())
    work.save_state(folder / f"{when}_moments.safetensors")


def _load(work: SiteWork, folder: Path, when: str) -> None:
    tensors, spec, _ = load_update(folder / f"{when}_adapter.safetensors")
    if spec != work.spec_whole():
        raise UpdateError(f"{folder}: holds the adapter of other settings")
    # The moments first: where they do not load nothing has changed. The asking side has
    # already dropped what a turned basis makes worthless.
    work.load_state(folder / f"{when}_moments.safetensors", reset_factors=False)
    work.load_adapter(tensors)
