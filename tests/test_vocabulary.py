"""tools/vocabulary.py: terms in prose and names, one-word function names, exceptions."""

from __future__ import annotations

import pytest

import vocabulary

TERMS = {r"pictures?\b": "image", r"goes on\b": "resumes", r"in all\b(?=\s*[^\w\s])": "total"}
RULES = vocabulary.Rules(
    terms=tuple((vocabulary.compile_term(term), replacement) for term, replacement in TERMS.items()),
    names={"told": "captions"},
    functions=frozenset({"forward"}),
    decorators=frozenset({"fixture", "property"}),
    excluded=("tests/data/golden/*",),
    exceptions=({"path": "prompts/*", "terms": ["pictures?"], "reason": "published prompts"},),
)


def check(text: str, path: str = "module.py") -> list[tuple[int, str]]:
    return [(finding.line, finding.term) for finding in vocabulary.check_text(path, text, RULES)]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("# The picture.\n", (1, "picture")),
        ('"""Module.\n\nPictures of dogs.\n"""\n', (3, "Pictures")),
        ('raise ValueError("no picture")\n', (1, "picture")),
        ('raise ValueError(f"{path}: no picture")\n', (1, "picture")),
        ("# The run goes\n# on tomorrow.\n", (1, "goes on")),
        ('message = (\n    "the run goes "\n    "on"\n)\n', (2, "goes on")),
        ('row("tokens in all")\n', (1, "in all")),
    ],
)
def test_check_text_finds_terms_in_comments_and_strings_of_python(text, finding):
    assert check(text) == [finding]


@pytest.mark.parametrize(
    "text",
    [
        "pixels = image.picture\n",  # an attribute that another library may define
        'message = f"{picture}"\n',
        'row("goes", "on")\n',
        "# Equal in all processes.\n",
        'message = f"missing in all {count} records"\n',
        "depicture = 1\n",
    ],
)
def test_check_text_passes_code_and_phrases_with_another_meaning(text):
    assert check(text) == []


@pytest.mark.parametrize(
    "definition",
    [
        "def read_picture(): pass",
        "def test_a_picture_is_read(): pass",
        "def read_image(picture_path): pass",
        "class PictureReader: pass",
        "num_pictures = 1",
        "self.picture_path = None",
    ],
)
def test_check_text_finds_terms_inside_names_that_python_defines(definition):
    assert [line for line, _ in check(definition)] == [1]


def test_check_text_passes_function_names_of_libraries():
    assert check("class File:\n    def forward(self): ...\n") == []
    assert check("def picture(): ...\n") == [(1, "def picture"), (1, "picture")]


def test_check_text_finds_whole_names_but_not_their_uses():
    assert check("told = caption(image)\nprint(told, told_apart)\n") == [(1, "told")]


@pytest.mark.parametrize(
    ("path", "text", "finding"),
    [
        ("page.md", "# Heading\n\nThe run goes\non.\n", (3, "goes on")),
        ("page.html", '<p class="a">\nA picture.</p>', (2, "picture")),
        ("page.js", "const pictureUrl = null;", (1, "pictureUrl")),
        ("card.toml", 'summary = "Reads pictures."', (1, "pictures")),
        ("Makefile", "picture: core\n", (1, "picture")),
        ("picture_reader.py", "", (1, "picture")),
    ],
)
def test_check_text_finds_terms_in_other_files_and_in_file_names(path, text, finding):
    assert check(text, path) == [finding]


def test_check_text_finds_function_names_of_one_word():
    program = """
        class Model:
            def forward(self): ...
            def __call__(self): ...
            @property
            def width(self): ...
            def _project(self): ...
            def load_weights(self):
                def weights(): ...

        @pytest.fixture(scope="module")
        def model(): ...
    """
    assert check("if True:\n" + program) == [(8, "def _project"), (10, "def weights")]


def test_check_text_passes_exceptions_in_their_files_only():
    assert check("A picture.", "prompts/vlm.md") == []
    assert check("A picture.", "docs/vlm.md") == [(1, "picture")]


def test_a_finding_names_the_place_the_term_and_the_replacement():
    (finding,) = vocabulary.check_text("docs/a.md", "One picture.\n", RULES)
    assert str(finding) == "docs/a.md:1: 'picture'; write 'image'"


def test_rules_exclude_paths():
    assert RULES.is_excluded("tests/data/golden/a.md")
    assert not RULES.is_excluded("tests/data/test_coco.py")


def test_each_exception_of_the_checkout_has_a_reason():
    rules = vocabulary.Rules.read(vocabulary.RULES)
    assert [exception for exception in rules.exceptions if set(exception) != {"path", "terms", "reason"}] == []


BANNED = (
    "a picture",
    "3 captions a region",
    "so many",
    "likewise",
    "the file as it is.",
    "three in all.",
    "by the same door",
)
ALLOWED = (
    *("an image", "in all processes", "B stands for batch", "the box lies in the image", "as it is written"),
    *("too small to tell the shapes apart", "a spec consists of a few numbers"),
    *("fine-tune a model and caption a region.", "the model captions a region."),
)


@pytest.mark.parametrize("example", BANNED)
def test_terms_of_the_checkout_match_banned_phrases(example):
    assert list(vocabulary.find_terms(example, vocabulary.Rules.read(vocabulary.RULES).terms))


@pytest.mark.parametrize("example", ALLOWED)
def test_terms_of_the_checkout_pass_phrases_with_another_meaning(example):
    assert not list(vocabulary.find_terms(example, vocabulary.Rules.read(vocabulary.RULES).terms))
