"""Memory of a training step by calculation: what the forward pass keeps for the backward pass.

Bytes of one image with T = grid x grid tokens of width C, b bytes a number in the network's
precision (the residual stream and the layer norms' inputs stay float32):

    block       4 T C  twice (inputs of the norms) + b T C (input of the adapters)
                + 3 b T C (queries, keys, values) + 4 b T C (input of the activation)
                + 6 b T C (inputs of proj and of the MLP's layers) if their weights train
                + what the attention's kernel keeps
    chunked     b heads T K, K keys a window (segment_anything's 14 x 14) or all T
    fused       b heads T' (2 (d + 2 side) + 2 d), T' tokens with padding: q', k', v and the result

With checkpointing a block keeps 4 T C alone and one block's activations are alive at a time.
Decoder and loss come on top, at the input's full resolution. A test holds the sum to the bytes
that autograd really saves.
"""

from __future__ import annotations

from flap_nvflare.sam.backbone import Architecture, architecture


def activation_bytes(
    arch: str | Architecture,
    image_size: int,
    batch: int,
    classes: int,
    bf16: bool,
    checkpointing: bool = False,
    kernel: str = "chunked",
    trained_blocks: int | None = None,
    weights: bool = False,
) -> int:
    """Bytes that a training step of method `flap` keeps between its two passes.

    Args:
        arch: the backbone.
        image_size: side of the input in pixels.
        batch: images in a step.
        classes: foreground classes.
        bf16: whether the network runs in bfloat16.
        checkpointing: whether blocks are computed again for the backward pass.
        kernel: `chunked`, `chunked without scores` or `fused`, see `sam.attention`.
        trained_blocks: last blocks in which something trains; None means all.
        weights: whether the encoder's own weights train as well, which keep their inputs.
    """
    sizes, b = architecture(arch), 2 if bf16 else 4
    trained = sizes.depth if trained_blocks is None else trained_blocks
    kept = 14 * b if weights else 8 * b  # of every token and channel of a block
    encoder = _encoder(sizes, image_size, b, kept, checkpointing, kernel, trained)
    return batch * (encoder + _decoder(sizes, image_size, classes, b))


def _encoder(
    sizes: Architecture,
    image_size: int,
    b: int,
    kept: int,
    checkpointing: bool,
    kernel: str,
    trained: int,
) -> int:
    tokens, c = sizes.grid(image_size) ** 2, sizes.embed_dim
    blocks = [
        (8 + kept) * tokens * c + _attention(sizes, image_size, index, b, kernel)
        for index in range(sizes.depth - trained, sizes.depth)
    ]
    if checkpointing and blocks:
        return max(blocks) + len(blocks) * 4 * tokens * c
    return sum(blocks)


def _attention(sizes: Architecture, image_size: int, block: int, b: int, kernel: str) -> int:
    grid, heads = sizes.grid(image_size), sizes.heads
    side = grid if block in sizes.global_blocks else sizes.window
    if kernel == "chunked without scores":
        return 0
    if kernel == "chunked":
        return b * heads * grid**2 * side**2
    padded = (-(-grid // side) * side) ** 2
    d = sizes.embed_dim // heads
    folded = d + 2 * side + (-(d + 2 * side) % 8)
    return b * heads * padded * (2 * folded + 2 * d)


def _decoder(sizes: Architecture, image_size: int, classes: int, b: int) -> int:
    """Two-way transformer, up-scaler, masks and loss."""
    grid = sizes.grid(image_size)
    # Maps of the embedding's width that the two-way transformer keeps, counted.
    transformer = grid**2 * sizes.dim * (21 * b // 2 + 9)
    upscaler, stages = 0, sizes.patch.bit_length() - 1
    for stage in range(1, stages + 1):
        values = sizes.dim // 2 ** (stage + 1) * (grid * 2**stage) ** 2
        # Norm: its input in float32; activation: its input and its result.
        upscaler += values * ((4 + 2 * b) if stage < stages else 2 * b)
    # Softmax, its logarithm, the one-hot truth and products of the Dice terms, in float32.
    loss = image_size**2 * ((classes + 1) * 4 * 3 + 8)
    return transformer + upscaler + loss


def largest_batch(
    memory_bytes: float,
    weights_bytes: float,
    arch: str | Architecture,
    image_size: int,
    classes: int,
    bf16: bool,
    checkpointing: bool,
    kernel: str = "fused",
) -> int:
    """The most images a step that fit, with a tenth of the memory left for transients.

    Args:
        memory_bytes: memory of the device.
        weights_bytes: weights, gradients and optimiser moments.
        arch, image_size, classes, bf16, checkpointing, kernel: as in `activation_bytes`.
    """
    one = activation_bytes(arch, image_size, 1, classes, bf16, checkpointing, kernel)
    return max(0, int((0.9 * memory_bytes - weights_bytes) // one))
