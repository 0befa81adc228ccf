"""SAM's mask decoder for a batch of images, each with its own tokens.

The published `MaskDecoder.predict_masks` takes one image with many prompts; here entry k of every
argument belongs to image k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def decode(
    decoder: Any, embedding: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the two-way transformer, the up-scaler and the hyper-networks.

    Args:
        decoder: a `MaskDecoder` with T mask tokens.
        embedding: image embeddings, (N, d, g, g).
        positions: dense positional encoding, (1, d, g, g).
        sparse: prompt tokens, (N, P, d); P may be 0.
        dense: dense prompt embedding, broadcastable to `embedding`.

    Returns:
        Mask logits (N, T, h, h), the IoU token's output (N, d) and the up-scaled
        features (N, c, h, h).
    """
    n, d, g, _ = embedding.shape
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(n, -1, -1), sparse], dim=1)
    out, image = decoder.transformer(embedding + dense, positions.expand(n, -1, -1, -1), tokens)
    features = decoder.output_upscaling(image.transpose(1, 2).reshape(n, d, g, g))
    weights = torch.stack(
        [mlp(out[:, 1 + k]) for k, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
    )
    masks = (weights @ features.flatten(2)).unflatten(2, features.shape[2:])
    return masks, out[:, 0], features
