"""Check the rules of style that a linter does not know.

Usage: ``python tools/style.py [--known FILE] [PATH ...]``. Each offence is one line: file,
line, rule, name. The last line measures the product code. Tests and generated files are
not checked. CONTRIBUTING.md explains the rules. Without paths the density of the product code
is checked too.

A file of known offences holds lines ``RULE COUNT``. That many are allowed and
no more, so that the list can only shrink. ``--write`` lowers its counts to those of today.
The exit code is 1 if there are more offences than known ones.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

PRODUCT = [
    "protocols",
    "client",
    "strategies",
    "server",
    "simulations",
    "fedknow",
]
FOLDERS = [*PRODUCT, "tools", "benchmarks", "examples"]
SKIPPED = re.compile(r"_pb2")
FILE_LINES = 400
CLASS_LINES = 250
FUNCTION_LINES = 50
COMPLEXITY = 12
SUMMARY_LENGTH = 72
TOKENS_PER_LINE = 7.5
COMMENTS_PER_LINE = 0.06, 0.12
CODE_TOKENS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)

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

# Users' files and run folders have these keys, so fields may be called so.
FILE_KEYS = frozenset({"about", "asked", "keep"})

Offence = tuple[int, str, str]
Baseline = Mapping[str, int]


def complexity(function: ast.AST) -> int:
    """Count the branches, conditions and comprehensions of a function."""
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
    """Return whether a comprehension has two loops or contains another one."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    descendants = list(ast.walk(node))[1:]
    return len(node.generators) > 1 or any(
        isinstance(part, COMPREHENSIONS) for part in descendants
    )


def length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Count the lines of a function or class, a function's docstring left out."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None:
        return lines
    docstring = node.body[0]
    return lines - (
        (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    )


def new_name(node: ast.AST) -> str | None:
    """Return the name that a node defines, if it defines one."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    return node.name if isinstance(node, FUNCTIONS) else None


def name_offences(node: ast.AST) -> Iterator[Offence]:
    """Yield the offence of a name that says nothing about its thing."""
    name = new_name(node)
    if name is None:
        return
    # The list holds `with_`, which is nothing without its underscore.
    if name in FUNCTION_WORDS or name.strip("_") in FUNCTION_WORDS:
        yield getattr(node, "lineno", 1), "function-word", name


def file_keys(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the names of a class's fields that are keys of files."""
    if not isinstance(node, ast.ClassDef):
        return
    for part in node.body:
        name = part.target if isinstance(part, ast.AnnAssign) else None
        if isinstance(name, ast.Name) and name.id in FILE_KEYS:
            yield name


def size_offences(node: ast.AST) -> Iterator[Offence]:
    """Yield the offences of size of a function or class."""
    if isinstance(node, ast.ClassDef) and length(node) > CLASS_LINES:
        yield (
            node.lineno,
            "class-lines",
            f"{node.name}: {length(node)} > {CLASS_LINES}",
        )
    if not isinstance(node, FUNCTIONS):
        return
    sizes = [
        ("function-lines", length(node), FUNCTION_LINES),
        ("complexity", complexity(node), COMPLEXITY),
    ]
    for rule, size, limit in sizes:
        if size > limit:
            yield node.lineno, rule, f"{node.name}: {size} > {limit}"


def summary_offences(node: ast.AST) -> Iterator[Offence]:
    """Yield the offence of a docstring whose first line is too long."""
    if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
        return
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    if len(summary) > SUMMARY_LENGTH:
        name = getattr(node, "name", "module")
        size = f"{len(summary)} > {SUMMARY_LENGTH} characters"
        yield getattr(node, "lineno", 1), "summary", f"{name}: {size}"


def offences_of(node: ast.AST) -> Iterator[Offence]:
    """Yield the offences of one node: its line, the rule, and what breaks it."""
    yield from name_offences(node)
    if is_nested(node):
        yield getattr(node, "lineno", 1), "nested-comprehension", ""
    yield from size_offences(node)
    yield from summary_offences(node)


def check(path: Path) -> list[Offence]:
    """Return all offences of one file."""
    text = path.read_text("utf-8")
    offences: list[Offence] = []
    lines = text.count("\n")
    if lines > FILE_LINES:
        offences.append((1, "file-lines", f"{lines} > {FILE_LINES}"))
    nodes = list(ast.walk(ast.parse(text)))
    allowed = set(chain.from_iterable(map(file_keys, nodes)))
    for node in nodes:
        if node not in allowed:
            offences += offences_of(node)
    return offences


@dataclass
class Density:
    """How dense code is: sums over files, and their ratios."""

    tokens: int = 0
    token_lines: int = 0
    comments: int = 0
    code_lines: int = 0

    @property
    def tokens_per_line(self) -> float:
        """The mean number of tokens of a line that has any."""
        return self.tokens / max(self.token_lines, 1)

    @property
    def comments_per_line(self) -> float:
        """The number of comments divided by that of lines of code."""
        return self.comments / max(self.code_lines, 1)

    def add(self, text: str) -> None:
        """Count the tokens, comments and lines of code of one file."""
        documented = docstring_lines(ast.parse(text))
        lines = text.splitlines()
        tokens: Counter[int] = Counter()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            self.comments += token.type == tokenize.COMMENT
            is_code = (
                token.type in CODE_TOKENS and token.start[0] not in documented
            )
            tokens[token.start[0]] += is_code
        self.tokens += tokens.total()
        self.token_lines += sum(1 for count in tokens.values() if count)
        self.code_lines += sum(
            1
            for number, line in enumerate(lines, 1)
            if line.strip()
            and number not in documented
            and line.strip()[0] != "#"
        )


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the numbers of all lines that belong to docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(
            node.value, ast.Constant
        ):
            continue
        if isinstance(node.value.value, str):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def python_files(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the files to check, in order."""
    for folder in folders:
        paths = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
        yield from (path for path in paths if not SKIPPED.search(path.as_posix()))


def read_baseline(path: Path) -> Baseline:
    """Return how many offences of each rule are known."""
    baseline = {}
    for line in path.read_text("utf-8").splitlines():
        rule, count = line.split()
        baseline[rule] = int(count)
    return baseline


def write_baseline(path: Path, counts: Baseline) -> None:
    """Lower the counts of the file to those given; none is ever raised."""
    baseline = read_baseline(path)
    lowered = {
        key: min(count, counts.get(key, 0)) for key, count in baseline.items()
    }
    lines = [f"{key} {count}\n" for key, count in lowered.items() if count]
    path.write_text("".join(lines), "utf-8")


def measure(folders: Sequence[Path]) -> list[str]:
    """Print how dense the code is, and return what is out of bounds.

    Both figures are compared at the precision of their bounds.
    """
    density = Density()
    for path in python_files(folders):
        density.add(path.read_text("utf-8"))
    tokens, comments = density.tokens_per_line, density.comments_per_line
    print(f"{tokens:.2f} tokens a line, {comments:.3f} comments per line of code")
    complaints = []
    if round(tokens, 1) > TOKENS_PER_LINE:
        complaints.append(f"more than {TOKENS_PER_LINE} tokens a line")
    low, high = COMMENTS_PER_LINE
    if not low <= round(comments, 2) <= high:
        complaints.append(
            f"comments per line of code not between {low} and {high}"
        )
    return complaints


def offences_by_rule(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Return the lines to print, by rule."""
    groups: dict[str, list[str]] = {}
    for path in python_files(folders):
        for line, rule, name in check(path):
            row = f"{path}:{line}: {rule} {name}".rstrip()
            groups.setdefault(rule, []).append(row)
    return groups


def print_grown(groups: Mapping[str, list[str]], baseline: Baseline) -> bool:
    """Print the groups that exceed their baseline; return if any does."""
    is_grown = False
    for key, rows in groups.items():
        # Once lines move, a new offence looks like an old one: a grown group shows them all.
        if len(rows) > baseline.get(key, 0):
            is_grown = True
            print("\n".join(rows))
    return is_grown


def main(arguments: list[str]) -> int:
    """Print the offences of the paths given, or of the whole project."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--known", type=Path, help="file of known offences")
    parser.add_argument(
        "--write", action="store_true", help="lower the known counts"
    )
    options = parser.parse_args(arguments)
    baseline = read_baseline(options.known) if options.known else {}
    groups = offences_by_rule(options.paths or map(Path, FOLDERS))
    is_grown = print_grown(groups, baseline)
    counts = {key: len(rows) for key, rows in groups.items()}
    if options.write and options.known:
        write_baseline(options.known, counts)
    print(
        f"{sum(counts.values())} offences of style, {sum(baseline.values())} known"
    )
    complaints = []
    if not options.paths:
        complaints = measure([Path(folder) for folder in PRODUCT])
    print("\n".join(complaints), end="\n" if complaints else "")
    return int(is_grown or bool(complaints))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
