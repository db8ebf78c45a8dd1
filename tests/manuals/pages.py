"""The pages that users read, and their fenced blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (*ROOT.glob("benchmarks/README.md"), *ROOT.glob("plugins/**/README.md"), *ROOT.glob("docs/*.md"))
    ),
]


def read_page(page):
    return (ROOT / page).read_text("utf-8")


def read_blocks(page, language):
    """Return the fenced blocks of a page in one language, without their indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```", read_page(page), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


def list_commands(program):
    """Return the lines of all shell blocks that run a program."""
    text = "".join(block for page in PAGES for block in read_blocks(page, "sh"))
    lines = text.replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line for line in lines if line.split()[:1] == [program]))
