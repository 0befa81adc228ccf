"""The commands `flap-nvflare export peft` and `flap-nvflare import peft`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path


def add_peft(subparsers: argparse._SubParsersAction) -> None:
    """Adds `peft` to the group `export`."""
    command = subparsers.add_parser(
        "peft", help="a folder that Hugging Face PEFT loads on transformers' SamModel"
    )
    command.description = (
        "Writes the low-rank factors as a LoRA of Hugging Face PEFT, and beside them the output "
        "layers, which a SamModel has no place for."
    )
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    command.add_argument(
        "--adapter", type=Path, required=True, metavar="FILE_OR_RUN", help="what to export"
    )
    _add_checkpoint(command)
    command.add_argument(
        "--base-model",
        default="",
        metavar="NAME",
        help="what PEFT shall call the base, such as facebook/sam-vit-base",
    )
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> None:
    from flap_nvflare.bundle.peft_export import export_peft
    from flap_nvflare.bundle.trained import load_trained

    done = export_peft(
        load_trained(parsed.adapter, parsed.checkpoint), parsed.out, parsed.base_model
    )
    if parsed.json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
        return
    print(
        f"{done.folder}: {done.layers} layers for PEFT (rank {done.rank}), and {done.head} tensors "
        f"of the head beside them; on the base with SHA-256 {done.base_sha256}"
    )


def add_import(commands: argparse._SubParsersAction) -> None:
    """Adds the group `import`."""
    group = commands.add_parser("import", help="an adapter from another program's files")
    parts = group.add_subparsers(dest="part", required=True, metavar="COMMAND")
    command = parts.add_parser("peft", help="from a LoRA of Hugging Face PEFT on a SamModel")
    command.description = (
        "Writes an adapter's file from a PEFT folder. One that `export peft` made gives the same "
        "bytes again. Any other plain LoRA on qkv, q_proj and v_proj is taken over exactly if it "
        "fits; what does not fit is refused. On which base that one was trained no file says: it "
        "counts as trained on --checkpoint."
    )
    command.add_argument("folder", type=Path, help="with adapter_config.json")
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the adapter's file to write"
    )
    _add_checkpoint(command)
    command.add_argument(
        "--federation",
        type=Path,
        metavar="FILE",
        help="federation.yaml with the settings of a LoRA from elsewhere: arch, rank, classes",
    )
    command.add_argument(
        "--cut", action="store_true", help="cut what has more directions than the settings' rank"
    )
    command.add_argument("--json", action="store_true", help="print JSON for programs")
    command.set_defaults(run=_import)


def _import(parsed: argparse.Namespace) -> None:
    from flap_nvflare.bundle.peft_import import import_peft
    from flap_nvflare.settings import Federation

    settings = Federation.load(parsed.federation) if parsed.federation else None
    done = import_peft(parsed.folder, parsed.out, parsed.checkpoint, settings, parsed.cut)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
        return
    how = "the file that the folder was made from" if done.same else "every product is PEFT's"
    if done.lost:
        how = f"cut: at most {done.lost:.2g} of a product's norm is lost (in {done.lost_in})"
    head = "" if done.head else "; the output layers are untrained, as the seed draws them"
    print(f"{done.file}: rank {done.rank}, {how}{head}")


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default="",
        metavar="SAM.pth",
        help="SAM's weights that the adapter was trained on; default FLAP_SAM_CHECKPOINT; not for "
        "the packaged ViT-T",
    )
