"""What can end a site's work before its end."""

from __future__ import annotations


class Stopped(Exception):
    """Someone asked the work to end: nothing of the interrupted round is kept."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the site, the round, the step and the mend."""


class StateError(ValueError):
    """A file of optimiser moments does not fit; the message names the file and the tensor."""
