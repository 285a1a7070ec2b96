"""One dialect in notebooks, package and tests. `python tests/harness/dialect.py [PATH ...]` lists each fault."""
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH, DEPTH, CELL = 120, 2, 60
SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.IfExp)


def nested(node, depth=0):
    """Expressions that choose, loop or define inside two others that do."""
    depth += isinstance(node, SCOPES)
    if depth > DEPTH:
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from nested(child, 0 if isinstance(child, ast.stmt) else depth)


def faults(code):
    """(line, what is wrong) of a piece of Python."""
    for number, line in enumerate(code.splitlines(), 1):
        if len(line) > WIDTH:
            yield number, f"{len(line)} characters wide; accepted: {WIDTH}"
    tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", code))
    ends = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and body[0].lineno == node.lineno:
                yield node.lineno, "a body on the line of its statement"
            if ends.get(node.lineno, node) is not node and not body_of(node, ends[node.lineno]):
                yield node.lineno, "two statements on a line"
            ends[node.lineno] = node
        if isinstance(node, ast.FormattedValue):
            if any(isinstance(n, (*SCOPES, ast.JoinedStr)) for n in ast.walk(node.value)):
                yield node.lineno, "a program inside an f-string"
    for node in nested(tree):
        yield node.lineno, f"an expression nested {DEPTH + 1} deep"


def body_of(node, other):
    """Whether one of two statements that begin on a line is inside the other (which is told elsewhere)."""
    return any(n is node for n in ast.walk(other)) or any(n is other for n in ast.walk(node))


def cells(path):
    """(name, code, whether it is exported) of a notebook's code cells or of a file."""
    if path.suffix == ".py":
        yield str(path), path.read_text(), False
        return
    number, found = 0, json.loads(path.read_text())["cells"]
    summary = re.search(r"(?m)^> (.*)$", "".join(found[0]["source"]))
    if summary and any("default_exp" in line for cell in found for line in cell["source"][:1]):
        yield f"{path} summary", f'"""{summary[1]}"""', False  # a room's is its module's docstring
    for cell in found:
        if cell["cell_type"] == "code":
            number += 1
            code = "".join(cell["source"])
            yield f"{path} cell {number}", code, bool(re.match(r"#\|\s*exporti?\b", code))


def report(paths):
    """Every fault in files and folders, as lines."""
    out = []
    for top in paths:
        files = [top] if top.is_file() else sorted(p for kind in ("*.ipynb", "*.py") for p in top.rglob(kind))
        for path in files:
            if "_modidx" in path.name or ".ipynb_checkpoints" in path.parts:
                continue
            for name, code, export in cells(path):
                out += [f"{name}:{line}: {what}" for line, what in faults(code)]
                if export and len(code.splitlines()) > CELL:
                    out.append(f"{name}: export cell of {len(code.splitlines())} lines; accepted: {CELL}")
    return out


if __name__ == "__main__":
    found = report([Path(p) for p in sys.argv[1:]] or [ROOT / "nbs", ROOT / "tests"])
    print("\n".join(found))
    print(f"{len(found)} places")
    sys.exit(bool(found))
