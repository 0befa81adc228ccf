"""The jobs that run at a site, noted on its disk, so that a site that was cut off finds them again.

FLARE's server knows a site in a job by the token of its login when the job began. A site that is
started anew logs in anew; its job's process is heard only with the token of before. So the note
holds the token, its signature and the session, readable by the site's own user alone like the keys
of its startup kit, and lasts no longer than the job's process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nvflare.apis.job_launcher_spec import JobProcessArgs

FILE = "flap_running.json"
CREDENTIALS = (JobProcessArgs.AUTH_TOKEN, JobProcessArgs.TOKEN_SIGNATURE, JobProcessArgs.SSID)


@dataclass(frozen=True)
class RunningJob:
    """A job's process at this site.

    Attributes:
        job: the job's id.
        pid: the process.
        returns: how often the site has gone on with the job after a start of its own.
        credentials: what the server knows the site by in this job, by FLARE's names of arguments.
    """

    job: str
    pid: int
    returns: int
    credentials: Mapping[str, str]

    def __post_init__(self) -> None:
        texts = [self.job, *self.credentials.values()]
        if not all(isinstance(text, str) for text in texts) or set(self.credentials) - {
            *CREDENTIALS
        }:
            raise ValueError(f"{FILE}: job {self.job!r} is not as this package notes it")
        if type(self.pid) is not int or type(self.returns) is not int or self.pid <= 1:
            raise ValueError(f"{FILE}: job {self.job!r} has process {self.pid!r}")


class RunningJobs:
    """The notes in a site's workspace, one in each running job's folder.

    Args:
        root: the site's workspace.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def note(self, job: RunningJob) -> None:
        """Writes the note whole or not at all."""
        path = self._path(job.job)
        path.parent.mkdir(exist_ok=True)
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            json.dump(asdict(job), stream)
        new.replace(path)

    def forget(self, job: str) -> None:
        """Removes the note of a job that has ended here."""
        with contextlib.suppress(OSError):  # the job has ended, whatever becomes of its note
            self._path(job).unlink(missing_ok=True)

    def left(self) -> list[RunningJob]:
        """The jobs that were running when the site was cut off; what can't be read is none."""
        found = []
        for path in sorted(self._root.glob(f"*/{FILE}")):
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                job = RunningJob(**json.loads(path.read_text(encoding="utf-8")))
                if job.job == path.parent.name and set(job.credentials) == set(CREDENTIALS):
                    found.append(job)
        return found

    def _path(self, job: str) -> Path:
        return self._root / job / FILE


def end_left_over(job: RunningJob) -> None:
    """Ends the process of before, should it still be there: two of them may not answer."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{job.pid}/cmdline").read_bytes().split(b"\0")
        if job.job.encode() in command:  # the number may be another process's by now
            os.killpg(job.pid, signal.SIGKILL)
