"""A trained adapter as a folder that Hugging Face PEFT loads on transformers' SAM.

    adapter_config.json         PEFT's configuration: plain LoRA, scale 1
    adapter_model.safetensors   the low-rank factors, see `adapter.peft`
    head.safetensors            what no `SamModel` has: the output layers of C+1 classes
    README.md                   what the three are and how they are used

The metadata of `head.safetensors` also hold the federation's settings and what the adapter's file
looked like, so that `peft_import` gives the same bytes again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from flap_nvflare.adapter.peft import CONFIG_FILE, MODEL_FILE, PeftError, to_peft
from flap_nvflare.adapter.update import (
    UpdateSpec,
    content_sha256,
    load_update,
    save_update,
    write_atomic,
)
from flap_nvflare.sam import tuning
from flap_nvflare.sam.lora import LoraFactors
from flap_nvflare.sam.offset import OFFSET_A, OFFSET_B

if TYPE_CHECKING:
    from flap_nvflare.bundle.trained import Trained
    from flap_nvflare.sam.segmenter import Segmenter

HEAD_FILE = "head.safetensors"
README_FILE = "README.md"
# Keys in the metadata of `HEAD_FILE`: spec and content of the adapter's file.
ADAPTER = "adapter"
ADAPTER_SHA256 = "adapter_sha256"
_README = """# A low-rank adapter for the Segment Anything Model

Made by flap_nvflare from `{file}`: {arch}, {image_size} pixels, method `{method}`, rank {rank},
classes: background, {classes}.

- `adapter_config.json`, `adapter_model.safetensors`: the low-rank factors as LoRA of Hugging Face
  PEFT for transformers' `SamModel`. Query, key and value share one layer `qkv` in the encoder; its
  factors stand there side by side, and the rows of the key are zero and must stay so.
- `head.safetensors`: {head}, under segment_anything's names. It has one
  mask token and one hyper-network for each of the {outputs} classes, and an up-scaler to full
  resolution. A `SamModel` has no place for them: PEFT alone gives SAM's own masks for your prompts,
  on adapted features, and no class masks.

```python
from peft import PeftModel
from transformers import SamModel

sam = PeftModel.from_pretrained(SamModel.from_pretrained(BASE), FOLDER)
```

BASE must hold the weights that the adapter was trained on: {base}{named}.
Hugging Face has SAM's published files as facebook/sam-vit-base, -large and -huge.

For the numbers of the training run, give `SamModel` a configuration of {image_size} pixels with the
position tables resized to it (absolute: bilinear, relative: linear), and `layer_norm_eps` 1e-5 in
its mask decoder: transformers' default of 1e-6 is not segment_anything's.

Back to an adapter's file, the same bytes: `flap-nvflare import peft FOLDER --out FILE`
(with `--checkpoint` if the base is not in the package).
"""


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    Attributes:
        folder: the folder.
        rank: of the adapter; its joint layers have twice that in PEFT's file, and more where a
            change of the frozen base went into them.
        layers: adapted layers in PEFT's file.
        head: tensors that only `head.safetensors` holds.
        base_sha256: the base that all of it belongs to.
    """

    folder: str
    rank: int
    layers: int
    head: int
    base_sha256: str


def export_peft(trained: Trained, folder: Path | str, base_model: str = "") -> Exported:
    """Writes the folder of a trained adapter.

    Args:
        trained: as `load_trained` gives it.
        folder: a new or empty folder.
        base_model: what PEFT shall call the base, such as `facebook/sam-vit-base`.

    Raises:
        PeftError: if the method has no adapters or the folder holds something.
        SettingsError: if the network is no SAM.
        OSError: if a file can't be written.
    """
    folder, network = Path(folder), trained.segmenter
    method = trained.federation.method
    if not tuning.method_named(method).lora:
        raise PeftError(
            f"{trained.file}: method {method!r} has no low-rank adapters, and PEFT's layout holds "
            "nothing else; take an adapter of flap, lora or lora_decoder"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PeftError(f"{folder}: holds something already; name a new folder")
    tensors, config = to_peft(_products(network))
    config["base_model_name_or_path"] = base_model or None
    head = _head(network, method)
    whole, spec, extra = load_update(trained.file)
    extra |= {ADAPTER: json.dumps(spec.to_dict()), ADAPTER_SHA256: content_sha256(whole)}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / MODEL_FILE, save(tensors, {"format": "pt"}))
    head_spec = UpdateSpec.of(head, method, spec.rank, spec.base_sha256)
    save_update(folder / HEAD_FILE, head, head_spec, extra)
    write_atomic(folder / README_FILE, _readme(trained, base_model).encode())
    # PEFT looks for this one first: written last, it makes the folder whole.
    write_atomic(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    return Exported(str(folder), spec.rank, len(tensors) // 2, len(head), spec.base_sha256)


@torch.no_grad()
def _products(network: Segmenter) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A of every slot; a change of the frozen base there is more columns and rows."""
    offset = network.offset
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for stem, factors in network.named_modules():
        if isinstance(factors, LoraFactors):
            b, a = factors.up(), factors.lora_a.detach()
            if stem + OFFSET_B in offset:
                b = torch.cat([b, offset[stem + OFFSET_B].to(b)], dim=1)
                a = torch.cat([a, offset[stem + OFFSET_A].to(a)])
            found[stem] = (b, a)
    return found


def _head(network: Segmenter, method: str) -> dict[str, Tensor]:
    """The output layers, trained or not, and all else that trains beside adapters."""
    return {
        name: parameter.detach()
        for name, parameter in network.named_parameters()
        if re.fullmatch(tuning.OUTPUT, name)
        or (tuning.method_named(method).holds(name) and not name.endswith(tuning.LORA_SUFFIXES))
    }


def _readme(trained: Trained, base_model: str) -> str:
    federation, sha256 = trained.federation, trained.spec.base_sha256
    base = f"the file of SAM with SHA-256\n`{sha256}`"
    if federation.base == "random":
        base = f"weights drawn from seed {federation.seed}, known as\n`{sha256}`"
    head = {
        "flap": "the output layers, trained with the factors",
        "lora": "the output layers, untrained",
        "lora_decoder": "the whole mask decoder, trained with the factors",
    }
    return _README.format(
        file=trained.file.name,
        arch=federation.arch,
        image_size=federation.image_size,
        method=federation.method,
        rank=federation.rank,
        classes=", ".join(federation.class_names),
        head=head[federation.method],
        outputs=federation.classes + 1,
        base=base,
        named=f", which is said to be `{base_model}`" if base_model else "",
    )
