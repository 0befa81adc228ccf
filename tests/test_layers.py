"""The rooms' rules: who may import whom, and what may never be called."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flap_nvflare"
# Room: the other rooms and heavy packages that it may import.
ALLOWED = {
    "data": {"monai", "nibabel"},
    "sam": {"torch", "segment_anything"},
    "adapter": {"torch"},
    "training": {"torch", "monai", "ignite", "data", "sam", "adapter"},
    "aggregation": {"torch", "adapter"},
    "bundle": {
        "torch", "monai", "ignite", "nibabel", "sam", "training", "data", "adapter", "aggregation",
    },
    "prediction": {"torch", "monai", "nibabel", "sam", "data", "training", "bundle"},
    "evaluation": {
        "torch", "sam", "data", "training", "adapter", "aggregation", "bundle", "prediction",
    },
    "report": set(),
    "experiments": {"adapter", "data", "report", "sam"},
    "site": {"torch", "adapter", "data", "sam"},
    "bench": {
        "torch", "monai", "nibabel", "sam", "data", "training", "adapter", "aggregation", "bundle",
        "prediction",
    },
    "flare": {
        "torch", "nvflare", "monai", "sam", "data", "adapter", "training", "aggregation", "bundle",
        "site",
    },
}  # fmt: skip
ROOMS = set(ALLOWED)
HEAVY = {"torch", "monai", "nvflare", "nibabel", "segment_anything", "ignite"}


def imports(path: Path) -> set[str]:
    """Rooms of this package and heavy packages that the file imports anywhere."""
    return imports_of(ast.parse(path.read_text(encoding="utf-8")))


def imports_of(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found.add(parts[1] if parts[0] == "flap_nvflare" and len(parts) > 1 else parts[0])
    return found


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_room_imports_only_what_it_may(room: str) -> None:
    # Only type annotations may name a room above: they are not run.
    for path in sorted((PACKAGE / room).rglob("*.py")):
        wrong = (imports(path) & (ROOMS | HEAVY)) - ALLOWED[room] - {room}
        if room == "data":
            wrong -= {"torch"}  # a torch Dataset of slices
        assert not wrong, f"{path.name} imports {sorted(wrong)}"


def test_settings_import_nothing_heavy() -> None:
    assert not imports(PACKAGE / "settings.py") & (HEAVY | ROOMS)


def test_only_flare_imports_nvflare() -> None:
    # The modules beside the rooms as well, wherever in the file.
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent != PACKAGE / "flare":
            assert "nvflare" not in imports(path), path


def at_load(path: Path) -> set[str]:
    """Rooms and heavy packages that the file imports when it is itself imported."""
    lines = ast.parse(path.read_text(encoding="utf-8"))
    lines.body = [node for node in lines.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return imports_of(lines) & (HEAVY | ROOMS)


@pytest.mark.parametrize("name", ["__init__", "cli", "combinations", "rules_table", "settings"])
def test_what_reads_settings_loads_fast(name: str) -> None:
    assert not at_load(PACKAGE / f"{name}.py")


COMMANDS = (
    "bundle/commands",
    "bundle/peft_commands",
    "data/prepare_commands",
    "evaluation/commands",
    "experiments/commands",
    "prediction/commands",
    "report/commands",
    "site/commands",
)


@pytest.mark.parametrize("path", COMMANDS)
def test_commands_load_fast(path: str) -> None:
    assert at_load(PACKAGE / f"{path}.py") <= {path.split("/")[0]}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def test_no_call_that_runs_what_a_file_or_a_peer_says() -> None:
    forbidden = {"eval", "exec", "yaml.load", "pickle.load", "pickle.loads", "pickle.dump"}
    for path in sorted(PACKAGE.rglob("*.py")):
        assert "pickle" not in imports(path), path
        for name, call in calls(path):
            assert name not in forbidden, f"{path}: {name}"
            if name == "torch.load":
                assert any(
                    keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
                    for keyword in call.keywords
                ), f"{path}: torch.load without weights_only=True"
