"""What a way to federate adds to a site's gradients, between the backward pass and the step.

- A pull towards an anchor, the gradient of mu / 2 |x - x0|^2: FedProx (arXiv 1812.06127) with the
  adapter that the round started from, Ditto (arXiv 2012.04221) for the site's own adapter.
- A shift c - c_k: SCAFFOLD (arXiv 1910.06378). The site's next control is the mean of the raw
  gradients along the round's path. The paper's option II, which reads it off the way gone, holds
  for steps of plain gradient descent at one rate; AdamW's steps are neither.

AdamW then takes the sum as its gradient: it scales it by its moments as it does any other.
Of several processes each adds the same to gradients that were averaged before.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch import Tensor

from flap_nvflare.sam.tuning import LORA_A, LORA_B, LORA_CORE, LORA_SUFFIXES
from flap_nvflare.training.tensor_files import read_tensors, write_tensors

FORMAT = "flap_nvflare.terms.1"


@dataclass(frozen=True)
class Pull:
    """A pull towards an anchor.

    On products the distance of an adapter is that of B A (or B R A), which has no basis:
    |B A - B0 A0|_F. Its gradient is made of r x r matrices: (B^T B) A - (B^T B0) A0 for A and
    B (A A^T) - B0 (A0 A^T) for B.

    Attributes:
        weight: mu.
        on: `factors` (every tensor as it is) or `products`. An adapter with a factor that trains
            but is not in the anchor, since it never leaves its site, is always pulled by factors.
        anchor: x0 by name; what is not in it is not pulled.
    """

    weight: float
    on: str
    anchor: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not self.weight >= 0 or self.on not in ("factors", "products"):
            raise ValueError(
                f"pull of weight {self.weight!r} on {self.on!r}; expected a weight from 0, on "
                "'factors' or 'products'"
            )


@dataclass(frozen=True)
class Terms:
    """The terms of one pass of training.

    Attributes:
        pull: the pull towards an anchor, if any.
        shift: what is added to the gradients, by name.
        collect: names of the parameters whose mean raw gradient is wanted.
    """

    pull: Pull | None = None
    shift: Mapping[str, Tensor] = field(default_factory=dict)
    collect: Collection[str] = ()


NO_TERMS = Terms()


class LocalTerms:
    """The trainer's handler that adds the terms; without terms it does nothing.

    Args:
        parameters: what trains, by name.
        fixed: factors of adapters that never change, by name.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self._fixed = dict(fixed or {})
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self.set(NO_TERMS)

    def set(self, terms: Terms) -> None:
        """The terms from now on; what was collected is forgotten.

        Raises:
            ValueError: if a tensor of the terms belongs to no parameter or has another shape.
        """
        anchor = {} if terms.pull is None else terms.pull.anchor
        for what, tensors in (("anchor", anchor), ("shift", terms.shift)):
            for name, tensor in tensors.items():
                if name not in self._parameters or tensor.shape != self._parameters[name].shape:
                    raise ValueError(f"{what} {name!r} {tuple(tensor.shape)} fits no parameter")
        if unknown := sorted(set(terms.collect) - set(self._parameters)):
            raise ValueError(f"no gradient of {unknown[0]!r} to collect: no such parameter")
        self._terms = terms
        self._anchor = {name: self._beside(name, tensor) for name, tensor in anchor.items()}
        self._shift = {name: self._beside(name, tensor) for name, tensor in terms.shift.items()}
        self._sums, self._steps = {}, 0

    def mean(self) -> dict[str, Tensor]:
        """Mean raw gradients over the steps since `set`, float32 on the CPU; zero if none came."""
        return {
            name: (self._sums[name] / self._steps).to("cpu", torch.float32)
            if name in self._sums
            else torch.zeros_like(self._parameters[name], device="cpu")
            for name in sorted(self._terms.collect)
        }

    def attach(self, engine: Engine) -> None:
        """Registers the handler with a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine | None = None) -> None:
        """Collects the gradients that the step is about to take, then adds to them."""
        self._collect()
        self._add(self._shift, 1.0)
        pull = self._terms.pull
        if pull is None or pull.weight == 0:
            return
        on_products = self._stems() if pull.on == "products" else []
        own = {stem + suffix for stem in on_products for suffix in LORA_SUFFIXES}
        apart = {
            name: self._parameters[name] - anchor
            for name, anchor in self._anchor.items()
            if name not in own
        }
        self._add(apart, pull.weight)
        for stem in on_products:
            self._add(self._product_gradients(stem), pull.weight)

    def _collect(self) -> None:
        self._steps += 1
        for name in self._terms.collect:
            gradient = self._parameters[name].grad
            if gradient is None:
                continue
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(gradient, dtype=torch.float64)
            self._sums[name] += gradient

    def _add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Adds to gradients; a parameter without one (the loss does not reach it) stays still."""
        for name, tensor in tensors.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.add_(tensor, alpha=weight)

    def _stems(self) -> list[str]:
        """Adapters of which every factor is in the anchor or never changes."""
        names = {name for name in self._parameters if name.endswith(LORA_SUFFIXES)}
        stems = {name.rpartition(".")[0] for name in names}
        return sorted(
            stem
            for stem in stems
            if not any(
                name not in self._anchor
                for suffix in LORA_SUFFIXES
                if (name := stem + suffix) in self._parameters
            )
        )

    def _product_gradients(self, stem: str) -> dict[str, Tensor]:
        """Gradient of 1/2 |B R A - B0 R0 A0|_F^2 for the factors of one adapter that train."""
        (a, a0), (b, b0) = self._now_and_then(stem + LORA_A), self._now_and_then(stem + LORA_B)
        if stem + LORA_CORE in self._parameters:
            core, core0 = self._now_and_then(stem + LORA_CORE)
            return {stem + LORA_CORE: (b.mT @ b) @ (core - core0) @ (a @ a.mT)}
        found = {
            stem + LORA_A: (b.mT @ b) @ a - (b.mT @ b0) @ a0,
            stem + LORA_B: b @ (a @ a.mT) - b0 @ (a0 @ a.mT),
        }
        return {name: tensor for name, tensor in found.items() if name in self._parameters}

    def _now_and_then(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self._parameters:
            return self._parameters[name].detach(), self._anchor[name]
        beside = next(iter(self._parameters.values()))
        self._fixed[name] = self._fixed[name].to(beside.device)
        return self._fixed[name], self._fixed[name]

    def _beside(self, name: str, tensor: Tensor) -> Tensor:
        return torch.empty_like(self._parameters[name]).copy_(tensor).detach()

    # ---- to other processes and back -----------------------------------------------------
    def save(self, path: Path) -> None:
        """Writes the terms, for processes that train in this one's place."""
        terms = self._terms
        pull = terms.pull and {"weight": terms.pull.weight, "on": terms.pull.on}
        tensors = {f"anchor/{name}": tensor for name, tensor in self._anchor.items()}
        tensors |= {f"shift/{name}": tensor for name, tensor in self._shift.items()}
        said = json.dumps({"pull": pull, "collect": sorted(terms.collect)}, sort_keys=True)
        write_tensors(path, tensors, FORMAT, said)

    def load(self, path: Path) -> None:
        """Takes the terms of a file of `save`.

        Raises:
            StateError: if there is no such file.
            ValueError: if it is of another network.
        """
        tensors, said = read_tensors(path, FORMAT)
        values, anchor = json.loads(said), _under("anchor/", tensors)
        pull = values["pull"] and Pull(values["pull"]["weight"], values["pull"]["on"], anchor)
        self.set(Terms(pull, _under("shift/", tensors), values["collect"]))

    def save_collected(self, path: Path) -> None:
        """Writes what was collected."""
        sums = {f"sum/{name}": tensor for name, tensor in self._sums.items()}
        write_tensors(path, sums, FORMAT, str(self._steps))

    def load_collected(self, path: Path) -> None:
        """Takes what other processes collected under the present terms.

        Raises:
            StateError: if there is no such file.
        """
        tensors, said = read_tensors(path, FORMAT)
        self._sums, self._steps = _under("sum/", tensors), int(said)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
