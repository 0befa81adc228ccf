"""The two ways of a federation, with what each end must remember: `Downlink` and `Uplink`.

With a list of stages an adapter or update goes as one coded message, see `stages`; without any it
goes as plain tensors, and the links only remember who holds what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from flap_nvflare.adapter.channel import Reference, Sender, receive
from flap_nvflare.adapter.factors import without_factors
from flap_nvflare.adapter.stages import parse

Tensors = dict[str, Tensor]


class Downlink:
    """The server's end of the way down: one message for all sites that are in step.

    Before the first round every site holds the adapter that it draws from the federation's seed,
    so that nothing but its name has to travel. A site that did not take part in the last round
    gets the adapter whole.

    Args:
        stages: what is done to an adapter on its way; empty for plain tensors.
        first: the adapter that every site draws by itself.

    Attributes:
        held: the adapter as the sites hold it in this round; it differs from the server's where
            coding loses something.
    """

    def __init__(self, stages: Sequence[str] = (), first: Mapping[str, Tensor] | None = None):
        self._pipeline = parse(stages, "down")
        self._coded = bool(stages)
        self.held: Tensors = dict(first or {})
        self._in_step: set[str] | None = None  # None: every site
        self._answered: set[str] | None = None
        self._message = b""
        self._whole: bytes | None = None  # made when the first site asks for it

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes a round's messages of the server's adapter; `held` is what they leave."""
        self._in_step, self._answered = self._answered, set()
        if not self._coded:
            self.held = dict(tensors)
            return
        sender = Sender(self._pipeline, _shapes(tensors))
        sent = sender.encode(tensors, Reference.of(self.held))
        self.held = dict(sent.held)
        self._message = sent.blob
        # Without differences the message is the adapter whole; coded twice it would be another.
        self._whole = None if self._pipeline.difference else sent.blob

    def message(self, site: str) -> bytes | None:
        """The coded message for a site; None where `held` goes as plain tensors."""
        if not self._coded:
            return None
        if self._in_step is None or site in self._in_step:
            return self._message
        if self._whole is None:
            sender = Sender(self._pipeline.whole, _shapes(self.held))
            self._whole = sender.encode(self.held, None).blob
        return self._whole

    def answered(self, site: str) -> None:
        """The site has answered in this round, so it holds what the round's message left."""
        if self._answered is not None:
            self._answered.add(site)

    def stored(self) -> Tensors:
        """What a checkpoint must keep: what the sites hold, where it is not the adapter itself."""
        return dict(self.held) if self._coded else {}

    def restore(self, held: Mapping[str, Tensor]) -> None:
        """Takes what `stored` gave; no site is known to be in step afterwards."""
        if held:
            self.held = dict(held)
        self._answered = set()


class Uplink:
    """A site's end of the way up, with the residue of its error feedback.

    Args:
        stages: what is done to an update on its way; empty for plain tensors.
    """

    def __init__(self, stages: Sequence[str] = ()) -> None:
        self._pipeline = parse(stages)
        self._coded = bool(stages)
        self._residue: Tensors = {}

    def send(
        self, update: Mapping[str, Tensor], held: Mapping[str, Tensor], turned: bool
    ) -> tuple[bytes | None, Tensors]:
        """The coded message of an update, and the update as it arrives.

        Args:
            update: what the site has trained.
            held: the adapter that it started from, with at least the update's names.
            turned: whether the factors are in another basis than in the last round: what was lost
                of them then lies in the old one and is forgotten.

        Returns:
            The message, None where plain tensors go; and the update at the server.
        """
        if not self._coded:
            return None, dict(update)
        shapes = _shapes(update)
        sender = Sender(self._pipeline, shapes)
        if turned:
            self._residue = without_factors(self._residue)
        # What was never sent, or only in other rounds, has lost nothing.
        sender.restore(
            {name: self._residue.get(name, zero) for name, zero in sender.state().items()}
        )
        start = Reference.of({name: held[name] for name in update})
        sent = sender.encode(update, start)
        self._residue.update(sender.state())
        return sent.blob, dict(sent.held)

    def stored(self) -> Tensors:
        """The residue, for a checkpoint; empty without feedback."""
        return dict(self._residue)

    def restore(self, residue: Mapping[str, Tensor]) -> None:
        """Takes what `stored` gave."""
        self._residue = dict(residue)


def arrived(
    message: bytes,
    stages: Sequence[str],
    way: str,
    held: Mapping[str, Tensor],
    names: Iterable[str],
) -> Tensors:
    """A coded message at its other end.

    Args:
        message: of any peer.
        stages: the stages agreed on.
        way: `up` or `down`.
        held: the adapter that this end holds.
        names: what the message should bring.

    Raises:
        CodecError: if it is damaged, of another kind, or a difference to another adapter.
    """
    ours = {name: held[name] for name in names}
    return receive(message, parse(stages, way), _shapes(ours), Reference.of(ours))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
