"""Check the vocabulary of code and documentation: `python tools/vocabulary.py [--function-names] [PATH...]`.

tools/vocabulary.toml lists the terms and what to write instead. Three rules are checked:

- Terms, in prose (comments, docstrings, messages, documentation, pages) and inside names (identifiers, file names).
- Names, whole identifiers that do not describe their value.
- Function names of a single word, which rarely describe what a function does; the file lists the allowed ones.

Each finding is a line `path:line: 'term'; write 'replacement'`. Without paths, all files of the checkout are checked.
With --function-names, the share of one-word function names of each folder is printed instead.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import token
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RULES = Path(__file__).with_suffix(".toml")
SUFFIXES = frozenset({".py", ".md", ".toml", ".html", ".js", ".css", ".sh", ".yml", ".yaml", ".cff", ".svg"})
NAMES_WITHOUT_SUFFIX = frozenset({"Makefile", "run"})
IDENTIFIER = re.compile(r"[A-Za-z_$][\w$]*")
WORD_IN_IDENTIFIER = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
STRING_PREFIX = re.compile(r"[A-Za-z]*(\"\"\"|'''|\"|')")
FSTRING_EXPRESSION = re.compile(r"\{[^{}]*\}")
FSTRING_START, FSTRING_MIDDLE, FSTRING_END = (  # new in Python 3.12
    getattr(token, name, None) for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
)
CODE = "\0"  # replaces code between pieces of prose, so that no phrase matches across it
EXPRESSION = "X"  # replaces the expressions of f-strings, which continue a sentence
FUNCTION_TYPES = ast.FunctionDef | ast.AsyncFunctionDef


class Finding(NamedTuple):
    """A term or name that should be replaced."""

    path: str
    line: int
    term: str
    replacement: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.term!r}; write {self.replacement!r}"


@dataclass(frozen=True)
class Rules:
    """The contents of vocabulary.toml.

    Attributes:
        terms: Patterns with their replacements, for prose and for the words of a name.
        names: Identifiers, and what to write instead.
        functions: Function names of one word that are allowed.
        decorators: Last names of decorators whose functions may have any name, such as "fixture".
        excluded: Patterns of paths that are not checked.
        exceptions: Tables with `path` (a pattern), `terms` (regular expressions of allowed matches) and `reason`.
    """

    terms: tuple[tuple[re.Pattern, str], ...]
    names: dict[str, str]
    functions: frozenset[str]
    decorators: frozenset[str]
    excluded: tuple[str, ...]
    exceptions: tuple[dict, ...]

    @classmethod
    def read(cls, file: Path) -> Rules:
        """Read a file such as vocabulary.toml."""
        table = tomllib.loads(file.read_text("utf-8"))
        return cls(
            terms=tuple((compile_term(term), replacement) for term, replacement in table["terms"].items()),
            names=table["names"],
            functions=frozenset(name for names in table["functions"]["allowed"].values() for name in names),
            decorators=frozenset(table["functions"]["decorators"]),
            excluded=tuple(table["excluded"]),
            exceptions=tuple(table.get("exceptions", ())),
        )

    def is_excluded(self, path: str) -> bool:
        """Return whether a path is not checked."""
        return any(fnmatch(path, pattern) for pattern in self.excluded)

    def is_exception(self, finding: Finding) -> bool:
        """Return whether a finding is among the listed exceptions."""
        return any(
            fnmatch(finding.path, exception["path"])
            and any(re.fullmatch(term, finding.term, re.IGNORECASE) for term in exception["terms"])
            for exception in self.exceptions
        )


class Function(NamedTuple):
    """A function definition: its name, its line, and the last names of its decorators."""

    name: str
    line: int
    decorators: frozenset[str]

    def has_one_word(self) -> bool:
        """Return whether the name is a single word; names with two underscores at both ends are Python's own."""
        return "_" not in self.name.strip("_") and not self.name.startswith("__")


def main(paths: list[str], function_names: bool) -> None:
    """Print the findings, or the share of one-word function names, and exit with status 1 if there are findings."""
    rules = Rules.read(RULES)
    files = list_files(paths, rules)
    if function_names:
        print(*format_function_names(files), sep="\n")
        return
    findings = [finding for path in files for finding in check_text(path, (ROOT / path).read_text("utf-8"), rules)]
    print(*findings, sep="\n", end="\n" * bool(findings))
    if findings:
        folders = Counter(finding.path.split("/")[0] for finding in findings)
        counts = ", ".join(f"{folder} {count}" for folder, count in folders.most_common())
        sys.exit(f"error: {len(findings)} findings ({counts}); exceptions are listed in tools/vocabulary.toml")


def list_files(paths: list[str], rules: Rules) -> list[str]:
    """Return the text files of the checkout, or those among the given paths and folders, relative to the checkout."""
    absolute_paths = [str(Path(path).resolve()) for path in paths] or ["."]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate", "--"]
    listing = subprocess.run([*command, *absolute_paths], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(
        path
        for path in listing.split("\0")
        if (Path(path).suffix in SUFFIXES or Path(path).name in NAMES_WITHOUT_SUFFIX)
        and (ROOT / path).is_file()
        and not rules.is_excluded(path)
    )


def check_text(path: str, text: str, rules: Rules) -> list[Finding]:
    """Return the findings in a file, by line; its path is relative to the checkout."""
    findings = [Finding(path, 1, *match) for match in find_terms(split_words(Path(path).stem), rules.terms)]
    if path.endswith(".py"):
        tree = ast.parse(text, path)
        prose = blank_code(text)
        identifiers: Iterable[tuple[str, int]] = iter_identifiers(tree)
        findings += check_functions(path, tree, rules)
    else:
        prose = text
        identifiers = iter_compound_names(text)
    for pattern, replacement in rules.terms:
        for match in pattern.finditer(prose):
            line = prose.count("\n", 0, match.start()) + 1
            findings.append(Finding(path, line, " ".join(match[0].split()), replacement))
    for name, line in identifiers:
        if name in rules.names:
            findings.append(Finding(path, line, name, rules.names[name]))
        elif path.endswith(".py") and name in rules.functions:
            continue  # the name of a library, such as `seek` of files
        elif split_words(name) != name.lower() or path.endswith(".py"):  # a plain word was checked as prose
            matches = find_terms(split_words(name), rules.terms)
            findings += [Finding(path, line, name, f"{new} (for {term})") for term, new in matches]
    return sorted({finding for finding in findings if not rules.is_exception(finding)})


def compile_term(term: str) -> re.Pattern:
    """Return the pattern of a term, in which a space also matches line breaks and comment signs."""
    return re.compile(rf"\b(?:{term})".replace(" ", r"\s+(?:(?:#|//|>|\*)\s*)?"), re.IGNORECASE)


def find_terms(phrase: str, terms: tuple[tuple[re.Pattern, str], ...]) -> Iterator[tuple[str, str]]:
    """Yield the terms found in a phrase or in the words of a name, each with its replacement."""
    for pattern, replacement in terms:
        if match := pattern.search(phrase):
            yield match[0], replacement


def split_words(name: str) -> str:
    """Return the words of a name in lower case: "imageWidth" and "image_width" -> "image width"."""
    return " ".join(WORD_IN_IDENTIFIER.findall(name)).lower()


def iter_compound_names(text: str) -> Iterator[tuple[str, int]]:
    """Yield the names of more than one word in a text that is not Python, each with its line."""
    for line, content in enumerate(text.splitlines(), 1):
        for match in IDENTIFIER.finditer(content):
            if not match[0].islower() or "_" in match[0]:
                yield match[0], line


def iter_identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that a module defines: functions, classes, parameters, variables and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno
            case ast.alias(asname=str()):
                yield node.asname, node.lineno
            case ast.ExceptHandler(name=str()) | ast.MatchAs(name=str()) | ast.MatchStar(name=str()):
                yield node.name, node.lineno


def blank_code(source: str) -> str:
    """Return a Python source in which only comments and the contents of strings are left, at their positions.

    Whitespace stays, and the quotes between adjacent strings become spaces, so that a phrase can continue in the next
    line or string. All other code becomes a character that no phrase matches.
    """
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    prose = [character if character.isspace() else CODE for character in source]
    fstring_starts = []
    for item in tokenize.generate_tokens(io.StringIO(source).readline):
        begin, end = (starts[row - 1] + column for row, column in (item.start, item.end))
        text = source[begin:end]
        if item.type == tokenize.COMMENT:
            prose[begin:end] = text.replace("#", " ")
        elif item.type == tokenize.STRING:
            opening = STRING_PREFIX.match(text)
            num_quotes = len(opening[1])
            content = text[opening.end() : -num_quotes]
            if "f" in opening[0].lower():
                content = FSTRING_EXPRESSION.sub(lambda match: EXPRESSION * len(match[0]), content)
            prose[begin:end] = f"{' ' * opening.end()}{content}{' ' * num_quotes}"
        elif item.type == FSTRING_MIDDLE:
            prose[begin:end] = text
        elif item.type == FSTRING_START:
            prose[begin:end] = " " * (end - begin)
            fstring_starts.append(end)
        elif item.type == FSTRING_END:
            prose[begin:end] = " " * (end - begin)
            start = fstring_starts.pop()
            prose[start:begin] = [EXPRESSION if each == CODE else each for each in prose[start:begin]]
    return "".join(prose)


def check_functions(path: str, tree: ast.AST, rules: Rules) -> list[Finding]:
    """Return the functions whose names are a single word that is not allowed."""
    return [
        Finding(path, function.line, f"def {function.name}", "a verb and its object, such as read_spec")
        for function in iter_functions(tree)
        if function.has_one_word()
        and function.name.strip("_") not in rules.functions
        and not function.decorators & rules.decorators
    ]


def iter_functions(tree: ast.AST) -> Iterator[Function]:
    """Yield the functions and methods of a module, with nested ones."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION_TYPES):
            names = [
                re.split(r"[.(]", ast.unparse(decorator).partition("(")[0])[-1] for decorator in node.decorator_list
            ]
            yield Function(node.name, node.lineno, frozenset(names))


def format_function_names(files: list[str]) -> Iterator[str]:
    """Yield a line per folder: its functions, how many names have one word, and the most frequent of them."""
    names: dict[str, list[Function]] = {}
    for path in files:
        if path.endswith(".py"):
            names.setdefault(path.split("/")[0], []).extend(iter_functions(ast.parse((ROOT / path).read_text("utf-8"))))
    for folder, functions in names.items():
        own_functions = [function for function in functions if not function.name.startswith("__")]
        one_word = [function.name for function in own_functions if function.has_one_word()]
        share = len(one_word) / max(1, len(own_functions))
        most_frequent = ", ".join(f"{name} {count}" for name, count in Counter(one_word).most_common(8))
        yield f"{folder:<12}{len(own_functions):>6} functions{share:>6.0%} of one word: {most_frequent}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--function-names", action="store_true", help="Print the share of one-word function names.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="Files and folders to check.")
    main(**vars(parser.parse_args()))
