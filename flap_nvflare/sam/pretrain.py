"""Pre-trains the small SAM on synthetic shapes: `python -m flap_nvflare.sam.pretrain --out DIR`.

The stock model learns, as SAM did (Kirillov et al., arXiv 2304.02643, appendix A), to turn points
and boxes into masks: focal and Dice loss, the best of three masks for an ambiguous prompt, and a
regressed IoU. A second task without prompts asks throw-away linear layers on the image embedding
and on the up-scaled features for edges, shapes and the noise-free picture; it teaches the encoder
and the decoder to work where no prompt says what to look for.

Pictures depend on seed and step alone, so a run that was cut off goes on with the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional

from flap_nvflare.sam.backbone import StockSam, architecture, initialise
from flap_nvflare.sam.decode import decode
from flap_nvflare.sam.objectives import TARGETS, dense_loss, draw_prompts, mask_loss
from flap_nvflare.sam.shapes import draw_pictures

BATCH = 16  # pictures in a step
RATE = 1.5e-3
WARMUP = 100  # steps
DECAY = 0.35  # last share of the steps, over which the rate falls to zero
HELD_OUT_SEED = 10**9  # pictures of the score; training seeds lie below


class Pretraining(nn.Module):
    """The small SAM and the throw-away layers of the task without prompts."""

    def __init__(self, arch: str, generator: torch.Generator) -> None:
        super().__init__()
        sizes = architecture(arch)
        with torch.device("meta"):
            self.sam = StockSam(sizes)
            self.from_embedding = nn.Conv2d(sizes.dim, TARGETS * sizes.patch**2 // 4, 1)
            self.from_features = nn.Conv2d(sizes.dim // 8, TARGETS, 1)
        self.to_empty(device="cpu")
        initialise(self, generator)
        align(self.sam.mask_decoder.transformer)
        self.size = sizes.native_size

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image embeddings and the positional encoding of their grid."""
        return self.sam.image_encoder(image), self.sam.prompt_encoder.get_dense_pe()

    def prompted(self, embedding: Tensor, positions: Tensor, prompts: Any) -> tuple[Tensor, Tensor]:
        """Mask logits (N P, 4, S/2, S/2) and predicted IoU (N P, 4)."""
        sparse, dense = self.sam.prompt_encoder(*prompts, None)
        embedding = embedding.repeat_interleave(sparse.shape[0] // embedding.shape[0], 0)
        decoder = self.sam.mask_decoder
        masks, token, _ = decode(decoder, embedding, positions, sparse, dense)
        return masks, decoder.iou_prediction_head(token)

    def unprompted(self, embedding: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The dense targets' maps at S/2, from the embedding and from the up-scaled features."""
        sparse = embedding.new_zeros(len(embedding), 0, embedding.shape[1])
        dense = self.sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        features = decode(self.sam.mask_decoder, embedding, positions, sparse, dense)[2]
        coarse = functional.pixel_shuffle(
            self.from_embedding(embedding), features.shape[-1] // embedding.shape[-1]
        )
        return coarse, self.from_features(features)


@torch.no_grad()
def align(transformer: Any) -> None:
    """Lets cross attention between prompts and image begin as a search by position.

    Equal projections of queries and keys make the score of a pair grow with the likeness of their
    positional encodings. From random projections the model needs thousands of steps to find that
    a prompt's place matters.
    """
    crossing = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossing += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossing:
        attention.q_proj.weight.mul_(2)
        attention.k_proj.weight.copy_(attention.q_proj.weight)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step: the same for the same seed and step."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def loss_of_step(model: Pretraining, seed: int, step: int) -> Tensor:
    """Draws the step's pictures and prompts and returns the loss."""
    generator = step_generator(seed, step)
    pictures = draw_pictures(BATCH, model.size, generator)
    prompts, target = draw_prompts(pictures, generator)
    embedding, positions = model.embed(pictures.image)
    loss = mask_loss(*model.prompted(embedding, positions, prompts), target)
    for maps in model.unprompted(embedding, positions):
        loss = loss + 0.5 * dense_loss(maps, pictures)
    return loss


def rate_at(step: int, steps: int) -> float:
    """Warm-up, constant, then linear to zero; the first part is the same for any `steps`."""
    left = (steps - step) / max(1, round(DECAY * steps))
    return RATE * min(1.0, (step + 1) / WARMUP, left)


@torch.no_grad()
def score(model: Pretraining, batches: int = 12) -> dict[str, float]:
    """Mean IoU at full resolution on held-out pictures, for points and for boxes.

    Of masks 1 to 3 the one that the IoU head prefers counts (`oracle`: the best one).
    """
    model.eval()
    chosen: dict[str, list[Tensor]] = {}
    for step in range(batches):
        generator = step_generator(HELD_OUT_SEED, step)
        pictures = draw_pictures(BATCH, model.size, generator)
        prompts, target = draw_prompts(pictures, generator)
        masks, quality = model.prompted(*model.embed(pictures.image), prompts)
        masks = functional.interpolate(masks[:, 1:], (model.size, model.size), mode="bilinear")
        truth = target[:, None]
        iou = ((masks > 0) & truth).sum((2, 3)) / ((masks > 0) | truth).sum((2, 3)).clamp_min(1)
        best = iou.gather(1, quality[:, 1:].argmax(1, keepdim=True))[:, 0]
        kept = target.sum((1, 2)) >= 9
        kind = "box" if prompts[0] is None else "points"
        chosen.setdefault(kind, []).append(best[kept])
        chosen.setdefault(f"{kind}_oracle", []).append(iou.amax(1)[kept])
    model.train()
    return {name: round(float(torch.cat(parts).mean()), 4) for name, parts in chosen.items()}


def export(model: Pretraining, folder: Path, facts: dict[str, Any]) -> None:
    """Writes `vit_t.safetensors` (fp16, SAM's own names) and `vit_t.json` beside it."""
    state = {name: t.half().contiguous() for name, t in sorted(model.sam.state_dict().items())}
    data = save(state)
    (folder / "vit_t.safetensors").write_bytes(data)
    facts = {
        **facts,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "parameters": sum(p.numel() for p in model.sam.parameters()),
        "image_size": model.size,
    }
    (folder / "vit_t.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m flap_nvflare.sam.pretrain`."""
    parser = argparse.ArgumentParser(
        prog="python -m flap_nvflare.sam.pretrain", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and state")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the whole run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--every", type=int, default=250, help="steps between saved states")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    run(options.out, options.steps, options.seed, options.every)


def run(out: Path, steps: int, seed: int, every: int) -> None:
    """Trains up to `steps`, going on from the state in `out` if there is one."""
    model = Pretraining("vit_t", step_generator(seed, -1))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.05)
    first = _restore(out / "state.safetensors", model, optimizer)
    began, mean = time.monotonic(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        loss = loss_of_step(model, seed, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean += (loss.item() - mean) / (step % 50 + 1) if step % 50 else loss.item() - mean
        done = step + 1
        if done % 50 == 0:
            pace = (time.monotonic() - began) / (done - first)
            print(f"step {done}/{steps} loss {mean:.4f} {pace:.3f} s/step", flush=True)
        if done % every == 0 or done == steps:
            _keep(out / "state.safetensors", model, optimizer, done)
            command = f"python -m flap_nvflare.sam.pretrain --out DIR --steps {steps} --seed {seed}"
            iou = score(model)
            print(f"step {done} prompted IoU {iou}", flush=True)
            export(model, out, {"command": command, "seed": seed, "steps": done, "iou": iou})


def _keep(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    tensors["step"] = torch.tensor(step)
    temporary = path.with_suffix(".tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
    temporary.replace(path)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    tensors = load_file(path)
    step = int(tensors["step"])
    model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        if f"exp_avg.{name}" in tensors:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    return step


if __name__ == "__main__":
    main()
