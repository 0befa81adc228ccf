"""What a package that reads strangers' files and messages may not do, found in its syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# Modules that make objects, and so run code, out of bytes.
_MODULES = frozenset(
    {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
)
_BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
_CALLS = frozenset(
    {
        "os.popen", "os.system", "subprocess.getoutput", "subprocess.getstatusoutput",
        "tempfile.mktemp", "torch.jit.load", "pandas.read_pickle",
        *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all")),
        *(f"yaml.{name}" for name in ("unsafe_load", "unsafe_load_all")),
        *(f"yaml.{name}" for name in ("Loader", "FullLoader", "UnsafeLoader")),
    }
)  # fmt: skip
_UNLESS_FALSE = frozenset({"allow_pickle", "shell"})


def unsafe(source: str) -> list[str]:
    """One line for each thing in the source that may not be there: its line and its name."""
    tree = ast.parse(source)
    known = dict(_imported(tree))
    return sorted(
        {f"{node.lineno}: {fault}" for node, fault in _faults(tree, known)},
        key=lambda text: int(text.split(":")[0]),
    )


def _faults(node: ast.AST, known: dict[str, str]) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        arguments = [one for one in ast.walk(node.args) if isinstance(one, ast.arg)]
        known = {**known, **{one.arg: f"argument.{one.arg}" for one in arguments}}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        for name in _modules(node):
            if _MODULES & set(name.split(".")):
                yield node, name
    elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
        name = _full_name(node, known)
        if name in _CALLS or name.removeprefix("builtins.") in _BUILTINS:
            yield node, name
    elif isinstance(node, ast.Call):
        for fault in _call_faults(node, _full_name(node.func, known)):
            yield node, fault
    for child in ast.iter_child_nodes(node):
        yield from _faults(child, known)


def _call_faults(call: ast.Call, name: str) -> Iterator[str]:
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "torch.load" and not _is(values.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    for keyword in _UNLESS_FALSE & values.keys():
        if not _is(values[keyword], False):
            yield f"{name} with {keyword}"
    if name == "numpy.load" and (None in values or len(call.args) > 2):
        yield "numpy.load with arguments that are not named"
    if name == "importlib.import_module" and call.args and isinstance(call.args[0], ast.Constant):
        module = str(call.args[0].value)
        if _MODULES & set(module.split(".")):
            yield module


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names and what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    names = [alias.name for alias in node.names]
    return names if isinstance(node, ast.Import) else [f"{node.module}.{name}" for name in names]


def _full_name(node: ast.expr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, known)}.{node.attr}"
    return ""


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
