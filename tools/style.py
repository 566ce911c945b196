"""Check the rules of style that a linter does not know: `python tools/style.py [PATH ...]`.

Each offence is one line: file, line, rule, name. The exit code is 1 if there are any.
Tests and generated files are left out. The rules are explained in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = [
    "protocols",
    "client",
    "strategies",
    "server",
    "simulations",
    "fedknow",
    "tools",
]
SKIPPED = re.compile(r"(_test\.py|/tests?/|_pb2)")
FILE_LINES = 400
CLASS_LINES = 250
FUNCTION_LINES = 50
COMPLEXITY = 12
SUMMARY_LENGTH = 72

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.With,
    ast.Assert,
    ast.match_case,
)
# A name says what a thing is. These words say only where it stands in a sentence.
FUNCTION_WORDS = frozenset(
    """
    of there here now after before again apart away both own told made given taken found known
    begun done left over around about beside aside inside outside towards able leant turned odd
    wrong past last most least first whole plain better worse fits wanted asked lacking lacks
    lying settled doubtful needed kept keep theirs ours papers mine others other rest more fewer
    few several halves said says way ways with_ where when why what who how much many so then
    """.split()  # noqa: SIM905  # a list of words reads best as a sentence
)

Offence = tuple[int, str, str]


def complexity(function: ast.AST) -> int:
    """Count the ways through a function: branches, conditions and comprehensions."""
    total = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            total += 1
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, COMPREHENSIONS):
            total += sum(len(generator.ifs) + 1 for generator in node.generators)
    return total


def is_nested(node: ast.AST) -> bool:
    """Whether a comprehension has two loops, or another comprehension within it."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    if len(node.generators) > 1:
        return True
    children = ast.iter_child_nodes(node)
    return any(
        isinstance(part, COMPREHENSIONS)
        for child in children
        for part in ast.walk(child)
    )


def length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Count the lines of a function or class, a function's docstring left out."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None:
        return lines
    docstring = node.body[0]
    return lines - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def new_name(node: ast.AST) -> str | None:
    """Return the name that a node gives to something, if it gives one."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    return node.name if isinstance(node, FUNCTIONS) else None


def offences_of(node: ast.AST) -> Iterator[Offence]:
    """Yield the offences of one node: its line, the rule, and what breaks it."""
    line = getattr(node, "lineno", 0)
    name = new_name(node)
    if name is not None and (
        name in FUNCTION_WORDS or name.strip("_") in FUNCTION_WORDS
    ):
        yield line, "function-word", name
    if is_nested(node):
        yield line, "nested-comprehension", ""
    if isinstance(node, ast.ClassDef) and length(node) > CLASS_LINES:
        yield line, "class-lines", f"{node.name}: {length(node)} > {CLASS_LINES}"
    if isinstance(node, FUNCTIONS):
        if length(node) > FUNCTION_LINES:
            yield (
                line,
                "function-lines",
                f"{node.name}: {length(node)} > {FUNCTION_LINES}",
            )
        if complexity(node) > COMPLEXITY:
            yield line, "complexity", f"{node.name}: {complexity(node)} > {COMPLEXITY}"
    if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
        summary = (ast.get_docstring(node) or "").partition("\n")[0]
        if len(summary) > SUMMARY_LENGTH:
            name = getattr(node, "name", "module")
            yield (
                line,
                "summary",
                f"{name}: {len(summary)} > {SUMMARY_LENGTH} characters",
            )


def check(path: Path) -> list[Offence]:
    """Return all offences of one file."""
    text = path.read_text("utf-8")
    found: list[Offence] = []
    lines = text.count("\n")
    if lines > FILE_LINES:
        found.append((1, "file-lines", f"{lines} > {FILE_LINES}"))
    for node in ast.walk(ast.parse(text)):
        found += offences_of(node)
    return found


def main(arguments: list[str]) -> int:
    """Print the offences of the paths given, or of the whole project."""
    total = 0
    for folder in map(Path, arguments or FOLDERS):
        paths = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
        for path in paths:
            if SKIPPED.search(path.as_posix()):
                continue
            for line, rule, name in check(path):
                print(f"{path}:{line}: {rule} {name}")
                total += 1
    print(f"{total} offences of style")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
