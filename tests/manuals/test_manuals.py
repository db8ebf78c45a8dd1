"""Every block of every manual does what it says; those for a shell run one after the other, as a reader runs them."""

import re
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest
from sca_registry.cards import Card, parse_cards
from world import ELSEWHERE, ROOT, done_here, opened

pytestmark = pytest.mark.slow

MANUALS = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (*(ROOT / "plugins").rglob("README.md"), *(ROOT / "docs").glob("*.md"))
    ),
]
QUICK = re.compile(r"^(sca (list|show|data stats scenes|data view scenes|data export)|make |pip )")
OWN = "out/own/mine.jsonl"  # the block that most people come for


def blocks(manual, language):
    """The blocks of a manual, without what they are indented by."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", (ROOT / manual).read_text("utf-8"), re.M | re.S)
    return [re.sub(rf"^{indent}", "", block, flags=re.M) for indent, block in found]


def told():
    for manual in MANUALS:
        for number, block in enumerate(blocks(manual, "sh")):
            if "mixer=mean" in block or not done_here(block):  # tests/test_readme.py makes that plugin
                continue
            quick = all(QUICK.match(line) and "runs/" not in line for line in block.splitlines()) or OWN in block
            marks = [] if quick else [pytest.mark.all]
            yield pytest.param(manual, block, marks=marks, id=f"{Path(manual).as_posix()}-{number}")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, sam_folder):
    """A folder for each manual, made when it is first asked for."""
    made = {}
    with ExitStack() as open_:

        def of(manual):
            if manual not in made:
                made[manual] = open_.enter_context(opened(tmp_path_factory.mktemp("reader"), sam_folder))
            return made[manual]

        yield of


@pytest.mark.parametrize(("manual", "block"), [*told()])
def test_every_block_of_commands_runs(worlds, manual, block):
    worlds(manual).run(block)


@pytest.mark.parametrize(("manual", "block"), [(manual, each) for manual in MANUALS for each in blocks(manual, "toml")])
def test_every_block_of_toml_is_read(manual, block):
    if "factory" in tomllib.loads(block).get(re.findall(r"^\[(.*)\]", block, re.M)[0], {}):
        assert all(isinstance(card, Card) and card.summary for card in parse_cards(block).values())


def test_what_is_not_run_is_still_said():
    lines = "".join(block for manual in MANUALS for block in blocks(manual, "sh")).splitlines()
    for pattern, why in ELSEWHERE:
        assert any(re.search(pattern, line) for line in lines), f"{pattern}: {why}"


def test_every_extra_that_is_installed_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for manual in MANUALS:
        for asked in re.findall(r"\.\[([\w,]+)\]|anything\[([\w,]+)\]", (ROOT / manual).read_text("utf-8")):
            assert set(next(filter(None, asked)).split(",")) <= set(extras), manual


def test_every_installation_from_the_clone_is_editable():
    lines = [line for manual in MANUALS for block in blocks(manual, "sh") for line in block.splitlines()]
    installs = [line for line in lines if re.match(r"pip install -c constraints.txt .*\.(\[|$| )", line)]
    assert len(installs) > 5
    for line in installs:
        assert re.match(r"pip install -c constraints.txt -e ('\.\[[\w,]+\]'|\.)( |$)", line), line
