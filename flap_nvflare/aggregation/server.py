"""The server's side of a round: what it holds between rounds, and how it gets from one to the next.

A rule makes one update of many; the server's optimiser makes a step of it. FLARE's aggregator
and a run in one process both come here, so that they do the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from flap_nvflare.adapter.factors import without_factors
from flap_nvflare.adapter.parcel import Parcel
from flap_nvflare.aggregation import accumulator, card
from flap_nvflare.aggregation.nova import moved_from_start, nova_weights
from flap_nvflare.aggregation.rule import (
    Accumulator,
    Aggregate,
    AggregationError,
    Contribution,
    Round,
)
from flap_nvflare.aggregation.server_optimizer import KINDS, scaffold_control, server_step
from flap_nvflare.settings import Federation

_RULE, _OPTIMIZER = "rule/", "optimizer/"


@dataclass(frozen=True)
class ServerState:
    """What the server holds between two rounds; all of it is written with the checkpoint.

    Attributes:
        tensors: the adapter: all that trains and travels, by name.
        offset: the change of the sites' frozen base, see `Aggregate.offset`.
        control: SCAFFOLD's control variate of the federation, by name; else empty.
        memory: what rule and optimiser remember, by `rule/...` and `optimizer/...`.
        turned: whether the last aggregation turned the basis of the factors, so that moments of
            them point nowhere.
    """

    tensors: Mapping[str, Tensor]
    offset: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    turned: bool = False

    def parcel(self) -> Parcel:
        """What goes down to the sites."""
        return Parcel(dict(self.tensors), dict(self.offset), dict(self.control))

    def kept(self, prefix: str) -> dict[str, Tensor]:
        """The part of the memory under a prefix, by names without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.memory.items()
            if name.startswith(prefix)
        }


class ServerRound:
    """One round at the server.

    Args:
        federation: rule, optimiser and their settings.
        index: the round, from 0.
        state: what the last round left.
        held: the adapter as the sites hold it, if its way down lost something; else None.
        sealed: adds encrypted updates in place of the rule, which must be linear; the adapter is
            then sealed, too, and no step can be made of it.
    """

    def __init__(
        self,
        federation: Federation,
        index: int,
        state: ServerState,
        held: Mapping[str, Tensor] | None = None,
        sealed: Accumulator | None = None,
    ) -> None:
        self._federation, self._index, self._state = federation, index, state
        self._round = Round(
            index=index,
            seed=federation.seed,
            rank=federation.rank,
            start=dict(state.tensors if held is None else held),
            offset=state.offset,
            memory=state.kept(_RULE),
            gauge=federation.gauge,
            energy=federation.energy,
            hostile=federation.hostile,
        )
        self._sealed = sealed is not None
        self._rule = sealed or accumulator(federation.rule, self._round)
        self._weights: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._changes: dict[str, Mapping[str, Tensor]] = {}

    def add(
        self, contribution: Contribution, steps: int = 1, change: Mapping[str, Tensor] | None = None
    ) -> None:
        """Takes one site's update.

        Args:
            contribution: the site's tensors.
            steps: optimiser steps that the site has done, for FedNova.
            change: the change of the site's control variate, for SCAFFOLD.

        Raises:
            AggregationError: if it can't count; everything is as before the call.
        """
        site, weight = contribution.site, contribution.weight
        if self._federation.optimizer == "fednova":
            contribution = replace(contribution, weight=weight / steps)
        self._rule.add(contribution)
        self._weights[site], self._steps[site] = weight, steps
        if change:
            self._changes[site] = {name: tensor.clone() for name, tensor in change.items()}

    def result(self, sites: int) -> tuple[ServerState, Aggregate]:
        """The state after the round, and what the rule made of it.

        Args:
            sites: all sites of the federation, for SCAFFOLD.

        Raises:
            AggregationError: if nothing was added, or a value of the result is not finite.
        """
        federation, state = self._federation, self._state
        found = self._rule.result()
        if self._sealed:
            return ServerState(found.tensors), found
        if federation.optimizer == "fednova":
            _, scale = nova_weights(self._weights, self._steps)
            found = moved_from_start(found, card(federation.rule), self._round, scale)
        tensors, optimizer = server_step(
            federation.optimizer if federation.optimizer in KINDS else "fedavg",
            self._round.start,
            found.tensors,
            state.kept(_OPTIMIZER),
            rate=federation.server_rate,
            momentum=federation.server_momentum,
            turned=found.turned,
        )
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise AggregationError(
                    f"the round's {name!r} holds nan or infinity; lower server_rate, or go on from "
                    "the last round without the site that made it so",
                    name,
                )
        control = state.control
        if self._changes:
            known = without_factors(control) if state.turned else control
            control = scaffold_control(known, self._changes, sites)
        after = ServerState(
            tensors=dict(sorted({**state.tensors, **tensors}.items())),
            offset=found.offset,
            control=control,
            memory=_joined({_RULE: found.memory, _OPTIMIZER: optimizer}.items()),
            turned=found.turned,
        )
        return after, found


def _joined(parts: Iterable[tuple[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    return {prefix + name: tensor for prefix, part in parts for name, tensor in part.items()}
