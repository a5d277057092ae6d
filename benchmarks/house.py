"""The size and shape of the code: `python -m benchmarks.house [CHECKOUT ...]`, one column a checkout.

Product is trainer/, launcher/ and crossrank.py; benchmarks and tests are not counted.
"""

import ast
import statistics
import sys
from collections import Counter
from pathlib import Path

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstring_lines(tree: ast.AST) -> int:
    """Those of attributes included."""
    texts = [
        part
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED)
        for part in node.body
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
    ]
    return sum((text.end_lineno or 0) - text.lineno + 1 for text in texts)


def fields_of_trainer(trees: list[ast.Module]) -> int:
    classes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "Trainer"]
    return sum(isinstance(part, ast.AnnAssign) for part in classes[0].body)


def measure(root: Path) -> dict[str, object]:
    files = sorted([*root.glob("trainer/**/*.py"), *root.glob("launcher/**/*.py"), *root.glob("crossrank.py")])
    texts = [path.read_text(encoding="utf-8") for path in files]
    trees = [ast.parse(text) for text in texts]
    functions = [n for tree in trees for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(n.end_lineno or 0) - n.lineno + 1 for n in functions]
    lines = [line for text in texts for line in text.splitlines()]
    folders = Counter(str(path.parent.relative_to(root)) for path in files if path.name != "__init__.py")
    return {
        "files in a folder": ", ".join(f"{name} {count}" for name, count in folders.most_common()),
        "longest file": max(len(text.splitlines()) for text in texts),
        "functions": len(sizes),
        "functions above 50 lines": sum(size > 50 for size in sizes),
        "longest function": max(sizes),
        "median function": statistics.median(sizes),
        "fields of Trainer": fields_of_trainer(trees),
        "product lines": len(lines),
        "of them blank": sum(not line.strip() for line in lines),
        "of them imports": sum(
            (n.end_lineno or 0) - n.lineno + 1
            for tree in trees
            for n in ast.walk(tree)
            if isinstance(n, (ast.Import, ast.ImportFrom))
        ),
        "of them comments": sum(line.lstrip().startswith("#") for line in lines),
        "of them docstrings": sum(map(docstring_lines, trees)),
    }


def main() -> None:
    measured = [measure(Path(root)) for root in sys.argv[1:] or ["."]]
    for name in measured[0]:
        print(
            f"{name:<26}"
            + "".join(f"{own[name]!s:<12}" if "folder" not in name else f"\n  {own[name]}" for own in measured)
        )


if __name__ == "__main__":
    main()
