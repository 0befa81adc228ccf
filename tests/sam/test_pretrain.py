from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flap_nvflare.sam import objectives, pretrain
from flap_nvflare.sam.checkpoint import PACKAGED
from flap_nvflare.sam.shapes import Pictures, draw_pictures


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return draw_pictures(8, 96, torch.Generator().manual_seed(0))


def test_pictures_look_like_network_inputs(pictures: Pictures) -> None:
    image = pictures.image
    assert image.shape == (8, 3, 96, 96)
    assert torch.equal(image[:, 0], image[:, 2])
    assert image.abs().max() <= 3
    assert abs(image.mean()) < 0.6
    assert 0.6 < image.std() < 1.4


def test_visible_parts_do_not_overlap(pictures: Pictures) -> None:
    assert pictures.visible.sum(1).max() == 1
    assert (pictures.visible <= pictures.whole).all()
    assert torch.equal(pictures.visible.any(1), pictures.whole.any(1))


def test_small_shapes_exist_and_are_small(pictures: Pictures) -> None:
    area = pictures.whole[:, 5:].sum((2, 3))
    assert 9 <= area[area > 0].float().median() <= 200


def test_pictures_depend_on_the_seed_alone() -> None:
    one, two, other = (
        draw_pictures(2, 32, torch.Generator().manual_seed(seed)).image for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_prompts_lie_where_they_should(pictures: Pictures) -> None:
    kinds = set()
    for seed in range(12):
        (points, boxes), target = objectives.draw_prompts(
            pictures, torch.Generator().manual_seed(seed)
        )
        kept = target.sum((1, 2)) > 9
        if points is None:
            kinds.add("box")
            low, high = boxes[kept, :2], boxes[kept, 2:]
            assert (low < high).all()
        else:
            kinds.add("points")
            x, y = points[0].long().unbind(-1)
            hit = target[torch.arange(len(target))[:, None], y, x]
            assert torch.equal(hit[kept], points[1][kept].bool())
    assert kinds == {"box", "points"}


def test_boxes_enclose_the_target() -> None:
    target = torch.zeros(1, 96, 96, dtype=torch.bool)
    target[0, 20:61, 30:51] = True  # rows 20..60, columns 30..50
    box = objectives._boxes(target, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(box, torch.tensor([30.0, 20.0, 50.0, 60.0]), rtol=0, atol=5.5)


def test_perfect_masks_lose_least() -> None:
    target = torch.zeros(2, 8, 8, dtype=torch.bool)
    target[:, 2:6, 2:6] = True
    perfect = torch.where(target[:, ::2, ::2], 20.0, -20.0)[:, None].expand(-1, 4, -1, -1)
    ones = torch.ones(2, 4)
    assert objectives.mask_loss(perfect, ones, target) < 1e-3
    assert objectives.mask_loss(-perfect, ones, target) > 1


def test_rate_starts_alike_for_every_length() -> None:
    short, long = ([pretrain.rate_at(k, n) for k in range(n)] for n in (1000, 2000))
    assert short[:650] == long[:650]
    assert short[-1] < 0.01 * pretrain.RATE
    assert max(long) == pretrain.RATE


def test_a_cut_off_run_goes_on_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "BATCH", 1)
    monkeypatch.setattr(pretrain, "score", lambda model: {})
    monkeypatch.setattr(pretrain, "DECAY", 0.01)
    pretrain.main(["--out", str(tmp_path / "whole"), "--steps", "3"])
    pretrain.main(["--out", str(tmp_path / "cut"), "--steps", "2"])
    pretrain.main(["--out", str(tmp_path / "cut"), "--steps", "3"])
    name = "vit_t.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_packaged_weights_match_their_record() -> None:
    facts = json.loads(PACKAGED.with_suffix(".json").read_text())
    data = PACKAGED.read_bytes()
    assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    assert facts["bytes"] == len(data) <= 4_000_000
    tensors = load_file(PACKAGED)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
