"""SAM's encoder attention with its decomposed relative position, on fused kernels.

SAM adds to the score of query (i, j) and key (k, l) the terms q . Rh[i, k] + q . Rw[j, l]
(Li et al., MViTv2, arXiv 2112.01526, equation 4). Both are folded into longer vectors,

    q' = [q / sqrt(d), q Rh[i], q Rw[j]],    k' = [k, onehot(k), onehot(l)],    q' . k' = the score

so that one product without a mask gives all of it. Tables are gathered once while they are
frozen. Windows are cut after the projections: segment_anything pads its windows before them, and
at 512 pixels spends 72 % more on qkv and proj in windowed blocks; here a padded token costs
nothing but its key and its value, which are the projection's bias.

Two kernels give the same numbers:

- `fused`: torch's scaled_dot_product_attention on q', k' (on a GPU its memory-efficient kernel:
  flash would want values as long as q').
- `chunked`: on a CPU, where it is faster than torch's (`python -m flap_nvflare.bench`): window by
  window, a few heads at a time, so that scores stay in the cache; queries of padded tokens are
  never computed. Its backward pass is written out and needs frozen tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Scores that a chunk may hold: 2 MiB in bf16, 4 MiB in float32, about a core's second cache.
CHUNK = 2**20
# New in torch 2.7; in 2.6 compiling says it as well, and gives the same numbers.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class EncoderAttention(nn.Module):
    """Takes over the weights of segment_anything's encoder attention under their own names.

    Args:
        stock: a `segment_anything.modeling.image_encoder.Attention` with relative position.
        window: side of the windows in tokens; 0 attends over the whole grid.

    Attributes:
        kernel: `fused`, `chunked`, or `auto`: chunked on a CPU while the tables are frozen. What
            is exported is always `fused`.
        keep_scores: whether `chunked` keeps its softmax for the backward pass, or makes it anew.
    """

    def __init__(self, stock: Any, window: int) -> None:
        super().__init__()
        self.heads: int = stock.num_heads
        self.window = window
        self.qkv, self.proj = stock.qkv, stock.proj
        self.rel_pos_h, self.rel_pos_w = stock.rel_pos_h, stock.rel_pos_w
        self.kernel = "auto"
        self.keep_scores = True
        self._gathered: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        n, h, w, c = x.shape
        qkv = self.qkv(x).view(n, h, w, 3, self.heads, c // self.heads)
        side_h, side_w = (self.window, self.window) if self.window else (h, w)
        rows, columns, hot = self.tables(side_h, side_w, qkv.dtype)
        pad = self.qkv.bias.detach().to(qkv.dtype).view(3, self.heads, -1)
        if self._chunked(x):
            out = _ChunkedAttention.apply(qkv, pad, rows, columns, hot, self.keep_scores)
        else:
            pad = self.qkv.bias.to(qkv.dtype).view(3, self.heads, -1)
            out = fused_attention(qkv, pad, rows, columns, hot)
        return cast(Tensor, self.proj(out.view(n, h, w, c)))

    def tables(self, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Rh (H, H, d), Rw (W, W, d) and the keys' position [onehot(k), onehot(l)] (H W, H + W).

        Gathered once for each dtype and each state of the tables, anew if they are trained.
        """
        if exporting():  # what is kept would stand in the file as constants
            return self._gather(height, width, dtype)
        tables = (self.rel_pos_h, self.rel_pos_w)
        trained = any(table.requires_grad for table in tables) and torch.is_grad_enabled()
        key = (height, width, dtype, *((id(t), t._version, t.device) for t in tables))
        if not trained and self._gathered is not None and self._gathered[0] == key:
            return self._gathered[1]
        if trained:
            return self._gather(height, width, dtype)
        # What inference mode makes could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            made = self._gather(height, width, dtype)
        self._gathered = (key, made)
        return made

    def _gather(self, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return (
            _gather(self.rel_pos_h, height).to(dtype),
            _gather(self.rel_pos_w, width).to(dtype),
            _positions(height, width, self.rel_pos_h.device).to(dtype),
        )

    def _chunked(self, x: Tensor) -> bool:
        if exporting():  # chunks would be unrolled
            return False
        trained = any(p.requires_grad for p in (self.rel_pos_h, self.rel_pos_w, self.qkv.bias))
        if self.kernel == "auto":
            return x.device.type == "cpu" and not trained and not torch.compiler.is_compiling()
        if self.kernel == "chunked" and trained and torch.is_grad_enabled():
            raise ValueError(
                "kernel 'chunked' has no gradient for the position tables and the bias of qkv; "
                "take 'auto' or 'fused' where they train"
            )
        return self.kernel == "chunked"


def exporting() -> bool:
    """Whether torch is writing the network down, as TorchScript or as a graph (ONNX)."""
    return torch.jit.is_tracing() or bool(_is_exporting())


def fused_attention(qkv: Tensor, pad: Tensor, rows: Tensor, columns: Tensor, hot: Tensor) -> Tensor:
    """Attention within windows by torch's scaled_dot_product_attention.

    Args:
        qkv: (N, H, W, 3, heads, d).
        pad: query, key and value of a padded token, (3, heads, d).
        rows, columns: Rh (h, h, d) and Rw (w, w, d) of windows of h x w tokens.
        hot: positions of a window's keys, (h w, h + w).

    Returns:
        (N, H, W, heads, d).
    """
    n, height, width, _, heads, d = qkv.shape
    h, w = len(rows), len(columns)
    down, across = -(-height // h), -(-width // w)
    if (down * h, across * w) != (height, width):
        padded = pad.expand(n, down * h, across * w, 3, heads, d).clone()
        padded[:, :height, :width] = qkv
        qkv = padded
    # (3, N, down, across, heads, h, w, d)
    parts = qkv.view(n, down, h, across, w, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = (part.reshape(-1, heads, h * w, d) for part in parts.unbind(0))
    q = _folded_query(q.flatten(0, 1), rows, columns).unflatten(0, (-1, heads))
    k = _folded_key(k.flatten(0, 1), hot).unflatten(0, (-1, heads))
    missing = -k.shape[-1] % 8  # what the memory-efficient kernel asks for
    if missing:
        q, k = functional.pad(q, (0, missing)), functional.pad(k, (0, missing))
    out = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    out = out.view(n, down, across, heads, h, w, d).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(n, down * h, across * w, heads, d)[:, :height, :width].contiguous()


def _gather(table: Tensor, size: int) -> Tensor:
    """Entry (i, k) is the table's row for the offset i - k, (size, size, d)."""
    if len(table) != 2 * size - 1:
        raise ValueError(
            f"relative position table of {len(table)} rows; {size} tokens a side need "
            f"{2 * size - 1}"
        )
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place[None, :] + size - 1]


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    place = torch.arange(height * width, device=device)
    row, column = place // width, place % width
    return torch.cat([functional.one_hot(row, height), functional.one_hot(column, width)], dim=1)


class _ChunkedAttention(torch.autograd.Function):
    """As `fused_attention`; with P = softmax(Q' K'^T) and O = P V the gradients are

    dV = P^T dO,  dS = P * (dO V^T - rowsum(P * dO V^T)),  dQ' = dS K',  dK = dS^T Q / sqrt(d).
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, pad: Tensor, rows: Tensor, columns: Tensor, hot: Tensor, keep: bool
    ) -> Tensor:
        out = torch.empty_like(qkv[:, :, :, 0])
        kept = []
        for chunk in _chunks(qkv.shape, len(rows), len(columns)):
            q, k, v = chunk.operands(qkv, pad)
            p = chunk.probabilities(q, k, rows, columns, hot)
            if keep and ctx.needs_input_grad[0]:
                kept.append(p)
            chunk.put(out, torch.bmm(p, v))
        ctx.save_for_backward(qkv, pad, rows, columns, hot, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, pad, rows, columns, hot, *kept = ctx.saved_tensors
        result = torch.empty_like(qkv)
        for index, chunk in enumerate(_chunks(qkv.shape, len(rows), len(columns))):
            q, k, v = chunk.operands(qkv, pad)
            p = kept[index] if kept else chunk.probabilities(q, k, rows, columns, hot)
            above = chunk.take(gradient)
            ds = torch._softmax_backward_data(torch.bmm(above, v.mT), p, -1, p.dtype)
            dq = chunk.unfolded(torch.bmm(ds, _folded_key(k, hot)), rows, columns)
            dk = torch.bmm(ds.mT, q).mul_(q.shape[2] ** -0.5)
            for slot, part in enumerate((dq, chunk.real(dk), chunk.real(torch.bmm(p.mT, above)))):
                chunk.put(result[:, :, :, slot], part)
        return result, None, None, None, None, None


@dataclass(frozen=True)
class _Chunk:
    """Some heads of some images in one window: m = images x heads matrices.

    Attributes:
        images, top, left, heads: where it lies in the grid.
        height, width: of the window, with its padded tokens.
    """

    images: slice
    top: slice
    left: slice
    heads: slice
    height: int
    width: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of real tokens."""
        return self.top.stop - self.top.start, self.left.stop - self.left.start

    def take(self, tensor: Tensor) -> Tensor:
        """(N, H, W, heads, d) -> the chunk's part (m, real tokens, d), dense."""
        part = tensor[self.images, self.top, self.left, self.heads].permute(0, 3, 1, 2, 4)
        return part.reshape(-1, part.shape[2] * part.shape[3], part.shape[4])

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """The way back of `take`, into `tensor`."""
        target = tensor[self.images, self.top, self.left, self.heads].permute(0, 3, 1, 2, 4)
        target.copy_(part.view(target.shape))

    def operands(self, qkv: Tensor, pad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (m, real tokens, d); keys and values (m, height width, d)."""
        q, k, v = (self.take(part) for part in qkv.unbind(3))
        if self.tokens != (self.height, self.width):
            k, v = self._padded(k, pad[1]), self._padded(v, pad[2])
        return q, k, v

    def _padded(self, part: Tensor, pad: Tensor) -> Tensor:
        heads = pad[self.heads].repeat(len(part) // len(pad[self.heads]), 1)
        full = heads[:, None, None].repeat(1, self.height, self.width, 1)
        full[:, : self.tokens[0], : self.tokens[1]] = part.unflatten(1, self.tokens)
        return full.flatten(1, 2)

    def real(self, part: Tensor) -> Tensor:
        """The real tokens' rows of (m, height width, d)."""
        grid = part.unflatten(1, (self.height, self.width))
        return grid[:, : self.tokens[0], : self.tokens[1]].flatten(1, 2)

    def probabilities(
        self, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, hot: Tensor
    ) -> Tensor:
        """Softmax of the scores, (m, real tokens, height width)."""
        query = _folded_query(q, rows[: self.tokens[0]], columns[: self.tokens[1]])
        return torch.softmax(torch.bmm(query, _folded_key(k, hot).mT), dim=-1)

    def unfolded(self, folded: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The gradient of the queries from that of q' (m, real tokens, d + height + width)."""
        d = rows.shape[2]
        grid = folded.unflatten(1, self.tokens)
        content, down, across = grid.split([d, self.height, self.width], dim=-1)
        result = content * d**-0.5
        result += torch.einsum("mijk,ikc->mijc", down, rows[: self.tokens[0]])
        result += torch.einsum("mijk,jkc->mijc", across, columns[: self.tokens[1]])
        return result.flatten(1, 2)


def _chunks(shape: torch.Size, height: int, width: int) -> Iterator[_Chunk]:
    """The chunks of qkv of `shape` (N, H, W, 3, heads, d), windows of height x width."""
    images, rows, columns, _, heads, _ = shape
    scores = (height * width) ** 2
    some_heads = min(heads, max(1, CHUNK // scores))
    some_images = max(1, CHUNK // (scores * heads))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            for image in range(0, images, some_images):
                for head in range(0, heads, some_heads):
                    yield _Chunk(
                        slice(image, image + some_images),
                        slice(top, min(top + height, rows)),
                        slice(left, min(left + width, columns)),
                        slice(head, head + some_heads),
                        height,
                        width,
                    )


def _folded_key(k: Tensor, hot: Tensor) -> Tensor:
    return torch.cat([k, hot.expand(k.shape[0], -1, -1)], dim=-1)


def _folded_query(q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """q' (m, h w, d + H + W) of queries (m, h w, d) at the first h x w places of a window.

    `rows` (h, H, d) and `columns` (w, W, d) are the tables of those places.
    """
    m, count, d = q.shape
    grid = q.view(m, len(rows), len(columns), d)
    terms = (
        torch.einsum("mijc,ikc->mijk", grid, rows).reshape(m, count, -1),
        torch.einsum("mijc,jkc->mijk", grid, columns).reshape(m, count, -1),
    )
    return torch.cat([q * d**-0.5, *terms], dim=-1)
