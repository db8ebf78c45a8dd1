"""mkdocs hook that generates pages of the site: `make docs`.

README chapters and the other manuals are copied. The reference is generated from the component cards, the `--help`
output and the docstrings.
"""

import re
from pathlib import Path

import typer
from mkdocs.structure.files import File
from sca_registry import get_registry
from sca_registry.contracts import COMPONENT_KINDS

import sca
from sca.cli import app

ROOT = Path(__file__).resolve().parent.parent
README_CHAPTERS = {  # page -> README chapters
    "index.md": ("", "Try it", "Install"),
    "python.md": ("In Python",),
    "command-line.md": ("On the command line",),
    "browser.md": ("In a browser",),
    "serving.md": ("As a server",),
    "models.md": ("The models that come along", "The published models, and real parts"),
    "training.md": ("Train a model",),
    "evaluation.md": ("Evaluate a model",),
}
MANUALS = {
    "comparing.md": ("Compare combinations", "benchmarks/README.md"),
    "plugins.md": ("Add a part", "plugins/README.md"),
}
COPIED_FILES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PAGES_BY_PATH = {  # path in the repository -> page of the site
    "docs/demo.jpg": "demo.jpg",
    "docs/reliability.md": "reliability.md",
    "docs/tutorial.md": "tutorial.md",
    "docs/security.md": "security.md",
    "plugins/README.md": "plugins.md",
    "benchmarks/README.md": "comparing.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}


def on_files(files, config):
    """Add the generated pages; called by mkdocs."""
    for name, content in make_pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def make_pages():
    """Return the content of every generated page by file name."""
    readme_chapters = split_chapters((ROOT / "README.md").read_text("utf-8"))
    content_by_page = {
        page: "\n".join(readme_chapters[title] for title in titles) for page, titles in README_CHAPTERS.items()
    }
    for page, (title, manual) in MANUALS.items():
        content_by_page[page] = f"{readme_chapters[title]}\n{lower_headings((ROOT / manual).read_text('utf-8'))}"
    content_by_page |= {page: (ROOT / path).read_text("utf-8") for page, path in COPIED_FILES.items()}
    content_by_page |= {
        "commands.md": render_commands(),
        "parts.md": render_parts(),
        "api.md": render_api(),
        "contracts.md": render_contracts(),
    }
    return {page: rewrite_links(raise_headings(content)) for page, content in content_by_page.items()}


def split_chapters(text):
    """Split a manual at its second-level headings; returns chapters by title, with "" for the text before the first."""
    pieces = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    chapters_by_title = {"": pieces[0]}
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        chapters_by_title[title] = f"## {title}\n{body}"
    return chapters_by_title


def raise_headings(text):
    """Raise all headings by one level if the page starts with a second-level heading."""
    return re.sub(r"^#(#+ )", r"\1", text, flags=re.MULTILINE) if text.startswith("## ") else text


def lower_headings(text):
    """Lower all headings by one level, except in code blocks."""
    pieces = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        re.sub(r"^#", "##", piece, flags=re.MULTILINE) if index % 2 == 0 else piece
        for index, piece in enumerate(pieces)
    )


def rewrite_links(text):
    """Replace links to repository files with links to pages, or with their text if there is no page."""

    def replace_link(match):
        image_mark, link_text, path = match.groups()
        if "://" in path or path.startswith("#"):
            return match[0]
        path = path.removeprefix("../")
        return f"{image_mark}[{link_text}]({PAGES_BY_PATH[path]})" if path in PAGES_BY_PATH else link_text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace_link, text)


def render_commands():
    """Render the `--help` output of every command."""
    lines = ["# Commands", ""]

    def add_command(command, name):
        context = command.make_context(name, [], resilient_parsing=True)
        if hasattr(command, "commands"):
            for subcommand in sorted(command.commands):
                add_command(command.commands[subcommand], f"{name} {subcommand}")
        else:
            lines.extend([f"## {name}", "", "```text", command.get_help(context).rstrip(), "```", ""])

    add_command(typer.main.get_command(app), "sca")
    return "\n".join(lines)


def render_parts():
    """Render the cards of all bundled components."""
    lines = [
        "# Parts by name",
        "",
        "`sca list KIND` has these and what plugins add; `sca show KIND NAME` has the options.",
        "",
    ]
    for kind in COMPONENT_KINDS:
        lines += [
            f"## {kind.replace('_', ' ')}",
            "",
            "| name | what it is | source | license |",
            "| --- | --- | --- | --- |",
        ]
        for name in get_registry(kind).list_names():
            entry = get_registry(kind).load_entry(name)
            if entry.distribution == "segment-caption-anything":
                cells = (f"`{name}`", entry.summary, entry.source, entry.license)
                lines.append(f"| {' | '.join((cell or '').replace('|', '/') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def render_api():
    """Render the reference of the package's public names."""
    lines = ["# Python", "", "What `import sca` has.", ""]
    for name in sca.__all__:
        lines += [f"::: {sca._LAZY_IMPORTS[name]}.{name}", ""]
    return "\n".join(lines)


def render_contracts():
    """Render the reference of the contracts."""
    return "# Contracts of parts\n\n::: sca_registry.contracts\n    options:\n      show_root_heading: false\n"
