from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from flap_nvflare.sam import segmenter as module
from flap_nvflare.sam.backbone import Architecture, StockSam
from flap_nvflare.sam.checkpoint import CheckpointError, file_sha256
from flap_nvflare.sam.decode import decode
from flap_nvflare.sam.segmenter import Segmenter, build_segmenter


def _image(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _bytes(model: Segmenter) -> str:
    return hashlib.sha256(save(dict(model.state_dict()))).hexdigest()


@pytest.mark.parametrize(("classes", "size"), [(1, 64), (3, 96)])
def test_logits_have_the_inputs_resolution(tiny: Architecture, classes: int, size: int) -> None:
    model = build_segmenter(tiny, size, classes, "flap", 2, 0, None, "random")
    logits = model(_image(2, size))
    assert logits.shape == (2, classes + 1, size, size)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_every_image_is_on_its_own(tiny: Architecture) -> None:
    model = build_segmenter(tiny, 64, 2, "flap", 2, 0, None, "random")
    images = _image(3, 64)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-4)


def test_encoder_is_segment_anythings(
    tiny: Architecture, tiny_stock: StockSam, tiny_file: str
) -> None:
    model = build_segmenter(tiny, 64, 2, "full", 2, 0, tiny_file)
    image = _image(2, 64)
    expected = tiny_stock.image_encoder(image)
    torch.testing.assert_close(model.image_encoder(image), expected, rtol=1e-5, atol=1e-5)


def test_decode_is_segment_anythings_decoder(tiny_stock: StockSam) -> None:
    """One image and stock tokens: the same masks as the published `predict_masks`."""
    embedding = tiny_stock.image_encoder(_image(1, 64))
    sparse, dense = tiny_stock.prompt_encoder(None, torch.tensor([[3.0, 4.0, 30.0, 40.0]]), None)
    positions = tiny_stock.prompt_encoder.get_dense_pe()
    masks, token, _ = decode(tiny_stock.mask_decoder, embedding, positions, sparse, dense)
    expected, quality = tiny_stock.mask_decoder.predict_masks(embedding, positions, sparse, dense)
    torch.testing.assert_close(masks, expected)
    torch.testing.assert_close(tiny_stock.mask_decoder.iou_prediction_head(token), quality)


def test_adapters_change_nothing_at_first(tiny: Architecture, tiny_file: str) -> None:
    image = _image(2, 64)
    plain = build_segmenter(tiny, 64, 2, "partial_decoder", 4, 0, tiny_file)
    adapted = build_segmenter(tiny, 64, 2, "flap", 4, 0, tiny_file)
    assert torch.equal(plain(image), adapted(image))
    with torch.no_grad():
        adapted.image_encoder.blocks[1].attn.qkv.v.lora_b.add_(0.1)
    assert not torch.equal(plain(image), adapted(image))


def test_weights_of_the_file_are_taken_over(
    tiny: Architecture, tiny_stock: StockSam, tiny_file: str
) -> None:
    model = build_segmenter(tiny, 64, 2, "flap", 2, 0, tiny_file)
    given, stock = model.state_dict(), tiny_stock.state_dict()
    for name in (
        "mask_decoder.output_upscaling.0.weight",
        "mask_decoder.output_upscaling.1.bias",
        "mask_decoder.output_upscaling.3.bias",
        "mask_decoder.iou_token.weight",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "image_encoder.blocks.0.attn.qkv.weight",
    ):
        assert torch.equal(given[name], stock[name]), name
    assert model.base_sha256 == file_sha256(Path(tiny_file))


@pytest.mark.parametrize("base", ["random", "pretrained"])
def test_same_seed_same_bytes(tiny: Architecture, tiny_file: str, base: str) -> None:
    def build(seed: int) -> Segmenter:
        return build_segmenter(tiny, 96, 2, "flap", 4, seed, tiny_file, base)

    torch.manual_seed(1)
    first = build(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert _bytes(first) == _bytes(build(0))
    assert _bytes(first) != _bytes(build(1))
    assert torch.equal(state, torch.get_rng_state())  # nobody else's randomness is touched


def test_head_and_adapters_do_not_depend_on_the_base(tiny: Architecture, tiny_file: str) -> None:
    drawn = build_segmenter(tiny, 64, 2, "flap", 4, 5, None, "random").state_dict()
    given = build_segmenter(tiny, 64, 2, "flap", 4, 5, tiny_file).state_dict()
    for name in ("mask_decoder.mask_tokens.weight", "image_encoder.blocks.0.attn.qkv.q.lora_a"):
        assert torch.equal(drawn[name], given[name])


def test_random_base_names_architecture_size_and_seed(tiny: Architecture) -> None:
    def identity(size: int, seed: int, method: str = "flap") -> str:
        return build_segmenter(tiny, size, 2, method, 2, seed, None, "random").base_sha256

    assert identity(64, 0) == identity(64, 0, "lora")
    assert len({identity(64, 0), identity(64, 1), identity(96, 0)}) == 3


def test_no_gradient_reaches_the_prompt_encoder(tiny: Architecture) -> None:
    model = build_segmenter(tiny, 64, 1, "full", 1, 0, None, "random")
    model(_image(1, 64)).sum().backward()
    assert all(p.grad is None for p in model.prompt_encoder.parameters())


def test_packaged_weights() -> None:
    model = build_segmenter("vit_t", 96, 2, "flap", 8, 0, "")
    assert model.base_sha256 == file_sha256(module.PACKAGED)
    with torch.inference_mode():
        assert model(_image(1, 96)).shape == (1, 3, 96, 96)


def test_packaged_weights_at_another_size() -> None:
    model = build_segmenter("vit_t", 128, 1, "flap", 8, 0)
    with torch.inference_mode():
        assert model(_image(1, 128)).shape == (1, 2, 128, 128)


def test_published_architecture_needs_a_file() -> None:
    with pytest.raises(CheckpointError, match=r"vit_b.*FLAP_SAM_CHECKPOINT"):
        build_segmenter("vit_b", 224, 2, "flap", 32, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "vit_x"}, "vit_x"),
        ({"image_size": 100}, "multiple of its patch size 8"),
        ({"classes": 0}, "classes"),
        ({"method": "flop"}, "flop"),
        ({"rank": 0}, "rank"),
        ({"base": "guess"}, "guess"),
    ],
)
def test_bad_values_are_named(changes: dict[str, object], said: str) -> None:
    values = {
        "arch": "vit_t", "image_size": 96, "classes": 2, "method": "flap", "rank": 8, "seed": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        build_segmenter(**{**values, **changes})  # type: ignore[arg-type]


def test_image_of_another_size_is_refused(tiny: Architecture) -> None:
    model = build_segmenter(tiny, 64, 1, "flap", 1, 0, None, "random")
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\).*64"):
        model(_image(1, 32))


def test_a_few_steps_learn() -> None:
    """Bright squares on dark ground: the loss falls under the method of the paper."""
    model = build_segmenter("vit_t", 48, 1, "flap", 4, 0, None, "random")
    image = torch.full((1, 3, 48, 48), -1.0)
    image[..., 16:40, 8:32] = 1.0
    label = (image[:, 0] > 0).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_vit_b_from_a_file_in_the_published_layout(tmp_path: Path) -> None:
    with torch.device("meta"):
        stock = StockSam("vit_b")
    state = {name: torch.full(t.shape, 0.01) for name, t in stock.state_dict().items()}
    torch.save(state, tmp_path / "sam_vit_b_01ec64.pth")
    model = build_segmenter("vit_b", 224, 2, "flap", 32, 0, tmp_path / "sam_vit_b_01ec64.pth")
    assert model.image_encoder.pos_embed.shape == (1, 14, 14, 768)
    assert model.image_encoder.blocks[2].attn.rel_pos_h.shape == (27, 64)
    with torch.inference_mode():
        assert model(_image(1, 224)).shape == (1, 3, 224, 224)
