"""Records, for each stage, the digest of its source next to its version: `python -m tests.stages.versions`."""

import ast
import hashlib
import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("versions.json")


def stage_files() -> list[Path]:
    """Every stage file that declares a `SPEC`."""
    return sorted(p for p in (ROOT / "stages").glob("*.py") if "\nSPEC = " in p.read_text())


def source_digest(path: Path) -> str:
    """Digest of a stage's code and of the `models` files it imports, blind to comments and layout."""
    hasher = hashlib.sha256()
    for file in sorted(_with_models(path, set())):
        hasher.update(ast.dump(_without_docstrings(ast.parse(file.read_text()))).encode())
    return hasher.hexdigest()[:16]


def _with_models(path: Path, seen: set[Path]) -> set[Path]:
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("models"):
            continue
        names = [node.module] if node.module != "models" else [f"models.{alias.name}" for alias in node.names]
        for name in names:
            file = ROOT / f"{name.replace('.', '/')}.py"
            if file.exists() and file not in seen:
                _with_models(file, seen)
    return seen


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body.pop(0)
    return tree


def current() -> dict[str, dict[str, object]]:
    """Stage name to version and source digest."""
    found = {}
    for path in stage_files():
        spec = importlib.import_module(f"stages.{path.stem}").SPEC
        found[spec.name] = {"version": spec.version, "source": source_digest(path)}
    return found


if __name__ == "__main__":
    RECORD.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n")
