"""The aggregator: guard in front, one rule of `aggregation` behind, quorum between them."""

from __future__ import annotations

import threading
import time
from typing import Any

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.app_constant import AppConstants

from flap_nvflare.adapter.guard import Limits, Refusal, check_message, check_update, printable
from flap_nvflare.adapter.parcel import parcel
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.aggregation import AggregationError, Contribution
from flap_nvflare.aggregation.encrypted_sum import EncryptedSum
from flap_nvflare.aggregation.server import ServerRound
from flap_nvflare.flare import messages
from flap_nvflare.flare.job import ServerJob, keep_best, server_job
from flap_nvflare.flare.reports import read_report
from flap_nvflare.flare.sizes import size_fault

# Refusals of one site that the line of a round lists: late answers have no bound of their own.


class QuorumError(RuntimeError):
    """Fewer updates counted than the federation asks for."""


class FlapAggregator(Aggregator):
    """Folds the updates of a round into one as they arrive, and keeps none of them.

    An update counts only if the guard and the rule accept it; a refused one is named in the
    log and in `rounds.jsonl`. The rules give the same result in every order of arrival.

    Args:
        max_norm: largest L2 norm of an update's tensors together.
        max_weight: largest weight a site may claim.
    """

    def __init__(self, max_norm: float = 1e4, max_weight: float = 1e6) -> None:
        super().__init__()
        self.max_norm = max_norm
        self.max_weight = max_weight
        self._limits = Limits(max_norm=max_norm, max_weight=max_weight)
        self._round: ServerRound | None = None
        self._counted: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._broken = ""

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Whether the update counts in the current round."""
        job = server_job(fl_ctx)
        site = str(fl_ctx.get_prop(messages.SENDER))
        round_index = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        count = messages.received_bytes(shareable)
        with self._lock:
            refusal = self._examine(shareable, site, round_index, job, count)
        job.ledger.add(round_index, site, "up", count)
        if refusal is not None:
            job.refuse(refusal)
            self.log_warning(
                fl_ctx,
                f"REFUSED update of site {site} in round {round_index}: "
                f"{refusal.key or 'message'}: {refusal.reason}",
            )
        return refusal is None

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """The aggregate as a DXO of weights.

        Raises:
            QuorumError: below quorum; the round fails and the last adapter stands.
        """
        job = server_job(fl_ctx)
        round_index = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        with self._lock:  # an answer after this one is too late
            self._closed = True
        if self._broken:
            raise RuntimeError(
                f"round {round_index}: the server failed while it took in the update of site "
                f"{self._broken} (see its log); go on from the last round"
            )
        self._check_quorum(job, round_index)
        if round_index > 0:
            keep_best(job, job.received(), round_index, job.validation_scores())
        started = time.perf_counter()
        job.state, job.aggregate = self._open(job, round_index).result(len(job.sites))
        job.aggregation_seconds = time.perf_counter() - started
        self._drop_strays(job)
        left_out = ", ".join(job.aggregate.excluded)
        self.log_info(
            fl_ctx,
            f"round {round_index}: {len(self._counted)} updates, rule "
            f"{job.federation.rule}, relative error {job.aggregate.error:.4f}"
            + (f", left out: {left_out}" if left_out else ""),
        )
        return DXO(DataKind.WEIGHTS, data=job.state.parcel().flat()).to_shareable()

    def reset(self, fl_ctx: FLContext) -> None:
        """Forgets the round's updates."""
        with self._lock:
            self._round = None
            self._counted.clear()
            self._closed, self._broken = False, ""

    def _check_quorum(self, job: ServerJob, round_index: int) -> None:
        counted = sorted(self._counted)
        if len(counted) < job.quorum:
            raise QuorumError(
                f"round {round_index}: {len(counted)} updates count "
                f"({', '.join(counted) or 'none'}), {job.quorum} needed "
                "(setting min_sites); refused: "
                f"{', '.join(refusal.site for refusal in job.refused) or 'none'}"
            )

    def _examine(
        self, shareable: Shareable, site: str, round_index: int, job: ServerJob, count: int
    ) -> Refusal | None:
        if self._closed:
            return Refusal(site, round_index, "", "the round is closed: too late an answer")
        if site in self._counted:
            return Refusal(site, round_index, "", "a second answer in the same round")
        if site not in job.taking_part:
            return Refusal(site, round_index, "", "the site was not drawn for this round")
        fault = shareable.get_header(messages.FAULT)
        if fault is not None:
            return Refusal(site, round_index, "", f"unreadable message: {printable(fault, 200)}")
        # Before anything of it is looked at: the look itself may cost as much again.
        expected = job.expected(site, round_index)
        travels = expected if job.cipher is None else job.cipher.spec(expected)
        if too_large := size_fault(count, travels, job.federation.optimizer == "scaffold"):
            return Refusal(site, round_index, "", too_large)
        try:
            dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
            spec = UpdateSpec.from_dict(dxo.meta[messages.SPEC])
            weight, sent_round = dxo.meta[messages.WEIGHT], dxo.meta[messages.ROUND]
            report = read_report(dxo.meta.get(messages.REPORT, {}), job.federation.class_names)
            tensors, offset, control = parcel(dict(dxo.data))
        except Exception as error:  # what a peer sends may raise anything
            reason = printable(str(error), 200)
            return Refusal(site, round_index, "", f"unreadable message: {reason}")
        known: dict[str, Any] = {
            "site": site,
            "round_index": sent_round,
            "expected_round": round_index,
            "weight": weight,
            "expected": expected,
            "limits": self._limits,
        }
        refusal = (
            check_update(tensors | offset, spec, frozen=job.frozen, **known)
            if job.cipher is None
            else check_message(spec, **known)  # the tensors' turn comes when they are added
        )
        if refusal is None and (control or job.federation.optimizer == "scaffold"):
            refusal = self._check_control(control, site, round_index, expected, job)
        if refusal is None:
            steps = report.get("steps", 0)
            most = self._limits.max_steps
            if type(steps) is not int or not 1 <= steps <= most:
                shown = printable(repr(steps))
                return Refusal(site, round_index, "", f"{shown} steps; expected 1 to {most}")
            one = Contribution(site, float(weight), tensors)
            refusal = self._fold(one, steps, control, round_index, job)
        if refusal is None:
            self._counted.add(site)
            job.downlink.answered(site)
            job.reports[site] = report
        return refusal

    def _check_control(
        self,
        control: dict[str, Any],
        site: str,
        round_index: int,
        expected: UpdateSpec,
        job: ServerJob,
    ) -> Refusal | None:
        """SCAFFOLD's variates: those of the update's tensors, if they were asked for."""
        if job.federation.optimizer != "scaffold":
            return Refusal(site, round_index, min(control), "control variates nobody asked for")
        return check_update(
            control,
            expected,
            site=site,
            round_index=round_index,
            expected_round=round_index,
            weighted=False,
            expected=expected,
            limits=self._limits,
        )

    def _fold(
        self,
        one: Contribution,
        steps: int,
        control: dict[str, Any],
        round_index: int,
        job: ServerJob,
    ) -> Refusal | None:
        """Gives the update to the round, and its site's own adapter to the cross-site matrix."""
        if job.federation.cross_site == "all" and round_index + 1 == job.federation.rounds:
            job.save_site(one.site, one.tensors, round_index)
        try:
            self._open(job, round_index).add(one, steps, control)
        except AggregationError as error:
            return Refusal(one.site, round_index, error.key, str(error))
        except BaseException:
            self._broken = one.site  # half of it may be in the sums
            raise
        return None

    def _open(self, job: ServerJob, round_index: int) -> ServerRound:
        if self._round is None:
            sealed = None if job.cipher is None else EncryptedSum(job.cipher, job.spec)
            self._round = ServerRound(
                job.federation, round_index, job.state, job.downlink.held, sealed
            )
        return self._round

    def _drop_strays(self, job: ServerJob) -> None:
        """Removes adapters of sites that do not count: of a refusal, or of a broken-off try."""
        for path in (job.folder.path / "sites").glob("*.safetensors"):
            if path.stem not in self._counted:
                path.unlink()
