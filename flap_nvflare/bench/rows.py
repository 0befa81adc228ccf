"""The benchmark's rows, in groups that can be asked for one by one."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch

from flap_nvflare.bench import steps
from flap_nvflare.bench.timing import Row, in_turn, peak_bytes, share, speed

PLAIN = "straightforward"


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    Attributes:
        device: where the networks run.
        bf16: whether the device computes in it; rows with it are left out otherwise.
        repeats: runs of every way.
        batch: images in a step.
        sizes: image sizes in pixels.
    """

    device: torch.device
    bf16: bool
    repeats: int
    batch: int
    sizes: tuple[int, ...]


def training(setting: Setting) -> list[Row]:
    """Our training step against the straightforward one, and against the arithmetic's floor."""
    rows = []
    for size in setting.sizes:
        ways = ["fp32", *(["bf16"] if setting.bf16 else [])]
        made = {
            way: steps.make_step(way, size, setting.batch, setting.device) for way in (*ways, PLAIN)
        }
        products = {
            f"product {way}": steps.make_product(
                setting.batch * (size // 16) ** 2, way == "bf16", setting.device
            )
            for way in ways
        }
        found = in_turn({**made, **products}, setting.repeats, setting.device)
        operations = steps.least_operations(size, setting.batch)
        for way in ways:
            note = f"flap step at {size} px in {way} / {PLAIN} in fp32"
            rows.append(speed(f"train_step_{size}_{way}", found[way], found[PLAIN], note))
        for way in ways:
            rate = products[f"product {way}"].operations / found[f"product {way}"]
            floor = operations / rate
            rows.append(
                share(
                    f"floor_{size}_{way}",
                    floor,
                    found[way],
                    "s of floor / step",
                    f"{operations / 1e9:.0f} G operations at {rate / 1e9:.0f} G/s",
                )
            )
        del made
        gc.collect()
    return rows


def full(setting: Setting) -> list[Row]:
    """Our step against full fine-tuning, straightforward."""
    size = setting.sizes[-1]
    way = "bf16" if setting.bf16 else "fp32"
    made = {
        name: steps.make_step(name, size, setting.batch, setting.device)
        for name in (way, f"{PLAIN}, full")
    }
    found = in_turn(made, setting.repeats, setting.device)
    note = f"flap step in {way} / all weights, {PLAIN} in fp32"
    return [speed(f"train_step_{size}_vs_full", found[way], found[f"{PLAIN}, full"], note)]


def huggingface(setting: Setting) -> list[Row]:
    """Our step against transformers' SamModel with PEFT, each in the same precision."""
    from flap_nvflare.bench import huggingface as other

    rows = []
    for size in setting.sizes:
        for way in ("fp32", *(["bf16"] if setting.bf16 else [])):
            made = {
                "ours": steps.make_step(way, size, setting.batch, setting.device),
                "peft": other.make_step(size, setting.batch, way == "bf16", setting.device),
            }
            found = in_turn(made, setting.repeats, setting.device)
            note = f"flap step at {size} px / transformers SamModel with PEFT, both in {way}"
            name = f"train_step_{size}_{way}_vs_peft"
            rows.append(speed(name, found["ours"], found["peft"], note))
            del made
            gc.collect()
    return rows


def memory(setting: Setting) -> list[Row]:
    """Peak memory of a step above the network, in MiB."""
    size = setting.sizes[-1]
    ways = ["fp32", *(["bf16", "bf16, checkpointing"] if setting.bf16 else [])]
    peaks = {way: _peak(way, size, setting) / 2**20 for way in (*ways, PLAIN, f"{PLAIN}, full")}
    names = {
        "fp32": f"train_memory_{size}_fp32",
        "bf16": f"train_memory_{size}",
        "bf16, checkpointing": f"train_memory_{size}_checkpointing",
        f"{PLAIN}, full": f"train_memory_{size}_full",
    }
    return [
        share(name, peaks[way], peaks[PLAIN], "MiB", f"{way} / {PLAIN} in fp32, above the network")
        for way, name in names.items()
        if way in peaks
    ]


def prefix(setting: Setting) -> list[Row]:
    """Adapters in the last four blocks, tokens before them from files."""
    rows = []
    for size in setting.sizes:
        made = {
            "cached": steps.make_cached_step(size, setting.batch, setting.bf16, setting.device),
            PLAIN: steps.make_step(PLAIN, size, setting.batch, setting.device),
        }
        found = in_turn(made, setting.repeats, setting.device)
        name = "prefix_cache_step" if size == setting.sizes[-1] else f"prefix_cache_step_{size}"
        note = f"last {steps.LAST_BLOCKS} blocks, tokens read from disk / all, {PLAIN} in fp32"
        rows.append(speed(name, found["cached"], found[PLAIN], f"{size} px: {note}"))
        del made
        gc.collect()
    return rows


def inference(setting: Setting) -> list[Row]:
    """Our whole network against segment_anything's encoder alone in float32."""
    rows = []
    for size in setting.sizes:
        ours, other = steps.make_predictions(size, setting.batch, setting.bf16, setting.device)
        found = in_turn({"ours": ours, "encoder": other}, setting.repeats, setting.device)
        name = "inference" if size == setting.sizes[-1] else f"inference_{size}"
        note = f"{size} px, whole network / segment_anything's encoder in fp32, a batch"
        rows.append(speed(name, found["ours"], found["encoder"], note))
    return rows


def merged(setting: Setting) -> list[Row]:
    """The merged network against base and adapter: a batch's seconds and peak of memory."""
    from flap_nvflare.bench.merged import WAYS, make_prediction, peak

    rows = []
    for size in setting.sizes:
        for way in ("fp32", *(["bf16"] if setting.bf16 else [])):
            rest = (size, setting.batch, way == "bf16", setting.device)
            made = {name: make_prediction(name, *rest) for name in WAYS}
            found = in_turn(made, setting.repeats, setting.device)
            del made
            gc.collect()
            peaks = {name: _alone(setting, peak, name, *rest) / 2**20 for name in WAYS}
            note = f"{size} px, {way}: merged / base and adapter, a batch"
            rows += [
                speed(f"merged_inference_{size}_{way}", found["merged"], found["adapter"], note),
                share(
                    f"merged_memory_{size}_{way}",
                    peaks["merged"],
                    peaks["adapter"],
                    "MiB",
                    f"{note}, above the network",
                ),
            ]
    return rows


def merged_dice(setting: Setting) -> list[Row]:
    """Dice of both on the demo's test cases, and the voxels in which they differ."""
    from flap_nvflare.bench.merged import demo_scores

    found = demo_scores()
    note = f"demo, site A: merged / base and adapter; {found.different} of {found.voxels:,} voxels"
    dice = found.dice
    return [share("merged_dice", dice["merged"], dice["adapter"], "Dice", f"{note} differ")]


def largest_batches(setting: Setting) -> list[Row]:
    """The largest batch on a GPU of 8 GB by calculation: plain, and with checkpointing."""
    from flap_nvflare.sam.memory import largest_batch

    rows = []
    # Weights in bfloat16 with adapters, gradients and moments in float32.
    weights = 2 * 90_500_000 + 16 * 1_846_384
    for size in (224, 512, 1024):
        plain, saving = (
            largest_batch(8e9, weights, steps.ARCH, size, steps.CLASSES, True, checkpointing)
            for checkpointing in (False, True)
        )
        name = f"largest_batch_8gb_{size}"
        note = "calculated: bf16 with checkpointing / without, fused kernel"
        rows.append(share(name, saving, plain, "images", note))
    return rows


def aggregation(setting: Setting) -> list[Row]:
    """The server's aggregate of 100 sites of ViT-B's size once the last update has arrived.

    Of rule `svd`, and of `mean`, which no rule can undercut; `bench.many_sites` measures all.
    """
    from flap_nvflare.bench.many_sites import measure_many

    figures = measure_many((20, 100), ("svd", "mean"))
    by = {(one.rule, one.sites): one for one in figures}
    rows = []
    for rule, suffix in (("svd", ""), ("mean", "_mean")):
        many, few = by[rule, 100], by[rule, 20]
        name, note = "aggregate_100_sites_seconds" + suffix, "100 sites / 20 sites"
        text = f"rule {rule}: {note}, from the last arrival"
        rows.append(Row(name, many.result_seconds, few.result_seconds, None, "s", text))
        name, text = f"aggregate_100_sites_memory{suffix}", f"rule {rule}: peak with {note}"
        rows.append(share(name, many.peak_bytes / 2**20, few.peak_bytes / 2**20, "MiB", text))
    return rows


def _peak(way: str, size: int, setting: Setting) -> float:
    return _alone(setting, _peak_here, way, size, setting.batch, setting.device)


def _peak_here(way: str, size: int, batch: int, device: torch.device) -> float:
    return peak_bytes(steps.make_step(way, size, batch, device), device)


def _alone(setting: Setting, measure: Callable[..., float], *arguments: object) -> float:
    """A peak of memory, on a CPU in a process of its own."""
    if setting.device.type == "cuda":
        return measure(*arguments)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(measure, *arguments).result()


GROUPS: Mapping[str, Callable[[Setting], list[Row]]] = MappingProxyType(
    {
        "training": training,
        "full": full,
        "huggingface": huggingface,
        "memory": memory,
        "prefix": prefix,
        "inference": inference,
        "merged": merged,
        "merged_dice": merged_dice,
        "largest_batches": largest_batches,
        "aggregation": aggregation,
    }
)
