"""The aggregator: guard in front, one rule of `aggregation` behind, quorum between them."""

from __future__ import annotations

import threading

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants

from flap_nvflare.adapter.guard import Limits, Refusal, check_update
from flap_nvflare.adapter.update import UpdateSpec
from flap_nvflare.aggregation import aggregate
from flap_nvflare.aggregation.rule import Contribution
from flap_nvflare.flare import messages
from flap_nvflare.flare.job import ServerJob, keep_best, server_job
from flap_nvflare.flare.reports import read_report


class QuorumError(RuntimeError):
    """Fewer updates counted than the federation asks for."""


class FlapAggregator(Aggregator):
    """Collects the updates of a round and makes one of them.

    An update counts only if the guard accepts it; a refused one is named in the log and in
    `rounds.jsonl`. Updates are kept by site and put in order before the rule sees them, so
    the result does not depend on their arrival.

    Args:
        max_norm: largest L2 norm of an update's tensors together.
        max_weight: largest weight a site may claim.
    """

    def __init__(self, max_norm: float = 1e4, max_weight: float = 1e6) -> None:
        super().__init__()
        self.max_norm = max_norm
        self.max_weight = max_weight
        self._limits = Limits(max_norm=max_norm, max_weight=max_weight)
        self._contributions: dict[str, Contribution] = {}
        self._lock = threading.Lock()
        self._closed = False

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Whether the update counts in the current round."""
        job = server_job(fl_ctx)
        site = str(fl_ctx.get_prop(messages.SENDER))
        round_index = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        with self._lock:
            refusal = self._examine(shareable, site, round_index, job)
        job.ledger.add(round_index, site, "up", messages.serialised_bytes(shareable))
        if refusal is not None:
            job.refused.append(refusal)
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
        self._check_quorum(job, round_index)
        if round_index > 0:
            received = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
            keep_best(job, received, round_index, job.validation_scores())
        result = aggregate(job.federation.rule, list(self._contributions.values()))
        job.aggregate, job.turned = result, result.turned
        if round_index + 1 == job.federation.rounds:
            self._keep_local(job, round_index)
        self.log_info(
            fl_ctx,
            f"round {round_index}: {len(self._contributions)} updates, rule "
            f"{job.federation.rule}, relative error {result.error:.4f}",
        )
        return DXO(DataKind.WEIGHTS, data=dict(result.tensors)).to_shareable()

    def reset(self, fl_ctx: FLContext) -> None:
        """Forgets the round's updates."""
        with self._lock:
            self._contributions.clear()
            self._closed = False

    def _check_quorum(self, job: ServerJob, round_index: int) -> None:
        counted = sorted(self._contributions)
        if len(counted) < job.quorum:
            raise QuorumError(
                f"round {round_index}: {len(counted)} updates count "
                f"({', '.join(counted) or 'none'}), {job.quorum} needed "
                "(setting min_sites); refused: "
                f"{', '.join(refusal.site for refusal in job.refused) or 'none'}"
            )

    def _examine(
        self, shareable: Shareable, site: str, round_index: int, job: ServerJob
    ) -> Refusal | None:
        if self._closed:
            return Refusal(site, round_index, "", "the round is closed: too late an answer")
        try:
            dxo = messages.read_dxo(shareable, DataKind.WEIGHTS)
            spec = UpdateSpec.from_dict(dxo.meta[messages.SPEC])
            weight, sent_round = dxo.meta[messages.WEIGHT], dxo.meta[messages.ROUND]
            report = read_report(dxo.meta.get(messages.REPORT, {}), job.federation.class_names)
        except Exception as error:  # what a peer sends may raise anything
            return Refusal(site, round_index, "", f"unreadable message: {str(error)[:200]}")
        if site in self._contributions:
            return Refusal(site, round_index, "", "a second answer in the same round")
        refusal = check_update(
            dxo.data,
            spec,
            site=site,
            round_index=sent_round,
            expected_round=round_index,
            weight=weight,
            expected=job.spec,
            frozen=job.frozen,
            limits=self._limits,
        )
        if refusal is None:
            self._contributions[site] = Contribution(site, float(weight), dict(dxo.data))
            job.reports[site] = report
        return refusal

    def _keep_local(self, job: ServerJob, round_index: int) -> None:
        """Each site's own last adapter, for the cross-site matrix."""
        if job.federation.cross_site == "all":
            for site, contribution in sorted(self._contributions.items()):
                job.folder.save(f"sites/{site}", contribution.tensors, job.spec, round=round_index)
