"""segment_anything must be importable whatever state torchvision is in."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

HEALTHY = {
    "torchvision/__init__.py": "",
    "torchvision/ops/__init__.py": "",
    "torchvision/ops/boxes.py": "def batched_nms(*a): ...\ndef box_area(*a): ...\n",
    "torchvision/transforms/__init__.py": "",
    "torchvision/transforms/functional.py": "def resize(*a): ...\ndef to_pil_image(*a): ...\n",
}
BROKEN = {
    "torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')\n"
}
BUILD = """
    from flap_nvflare.sam import official
    print(official.modelling().MaskDecoder.__name__, official.submodule("common").__name__)
    import segment_anything
"""


def _python(tmp_path: Path, files: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_healthy_torchvision_gives_the_whole_package(tmp_path: Path) -> None:
    done = _python(tmp_path, HEALTHY, BUILD + "    print(segment_anything.SamPredictor.__name__)")
    assert done.stdout.split() == [
        "MaskDecoder",
        "segment_anything.modeling.common",
        "SamPredictor",
    ]


def test_broken_torchvision_still_gives_the_model(tmp_path: Path) -> None:
    code = """
    try:
        segment_anything.SamPredictor
    except AttributeError as error:
        print(error)
    from segment_anything.build_sam import sam_model_registry
    print(sorted(sam_model_registry))
    """
    done = _python(tmp_path, BROKEN, BUILD + code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "MaskDecoder segment_anything.modeling.common"
    assert "SamPredictor" in lines[1]
    assert "torchvision" in lines[1]
    assert "vit_b" in lines[2]


def test_an_earlier_failed_import_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
    try:
        import segment_anything
    except RuntimeError:
        pass
    from flap_nvflare.sam import official
    official.modelling()
    from segment_anything import build_sam, modeling
    print(build_sam.Sam is modeling.Sam is official.modelling().Sam)
    """
    done = _python(tmp_path, BROKEN, code)
    assert done.stdout.split() == ["True"], done.stderr


def test_missing_package_names_the_mend(tmp_path: Path) -> None:
    files = {"segment_anything/__init__.py": "raise ImportError('no')\n"}
    code = """
    from flap_nvflare.sam import official
    try:
        official.modelling()
    except ImportError:
        print("segment_anything" in sys.modules)
    """
    done = _python(tmp_path, files, code)
    assert done.stdout.split() == ["False"], done.stderr


def test_tuning_leaves_segment_anything_alone(tmp_path: Path) -> None:
    code = """
    import flap_nvflare.sam.tuning as tuning
    tuning.travels("flap", "mask_decoder.mask_tokens.weight")
    heavy = ("segment_anything", "monai", "nvflare", "torchvision", "safetensors")
    print([name for name in heavy if name in sys.modules])
    """
    assert _python(tmp_path, {}, code).stdout.strip() == "[]"
