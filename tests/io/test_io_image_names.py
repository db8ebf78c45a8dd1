"""Names in files lead to the image they mean, or are refused."""

import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sca.io.errors import InputError
from sca.io.image_names import add_image_prefix, list_possible_file_names, remove_image_prefix, resolve_image_path
from sca.io.paths import distinguish_paths, normalize_name

PARTS = st.text(st.sampled_from("ab é각Å%20 +#&~-"), min_size=1, max_size=6).filter(
    lambda part: part.strip(" ") == part
)
FOLDERS = {  # of an export, and the root that its names are looked up in
    "beside": ("", ""),
    "below": ("images", ""),
    "same": ("images", "images"),
    "deep": ("images/train", "images"),
}
SPELLINGS = {
    "literal": lambda name: name,
    "windows": lambda name: name.replace("/", "\\"),
    "dot": lambda name: f".\\{name}",
    "composed": lambda name: unicodedata.normalize("NFC", name),
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "percent": quote,
    "percent, windows": lambda name: quote(name).replace("/", "\\"),
    "local files": lambda name: f"/data/local-files/?d={quote(name)}",
    "local files, not encoded": lambda name: f"/data/local-files/?d={name}",
    "upload": lambda name: f"/data/upload/7/{name}",
    "another machine": lambda name: f"C:\\Users\\me\\{name}".replace("/", "\\"),
    "another home": lambda name: f"/home/elsewhere/{name}",
    "file url": lambda name: f"file:///home/elsewhere/{quote(name)}",
}


@settings(deadline=None, max_examples=300)
@given(
    stem=PARTS,
    others=st.lists(PARTS, max_size=3),
    layout=st.sampled_from(sorted(FOLDERS)),
    spelling=st.sampled_from(sorted(SPELLINGS)),
    decomposed=st.booleans(),
    short=st.booleans(),
)
@pytest.mark.slow
def test_find_image_resolves_every_spelling_or_refuses(stem, others, layout, spelling, decomposed, short):
    folder, root_name = FOLDERS[layout]
    with TemporaryDirectory() as temporary:
        export = Path(temporary, "export")
        root = export / root_name
        wanted = (export / folder).joinpath(unicodedata.normalize("NFD" if decomposed else "NFC", f"{stem}.png"))
        wanted.parent.mkdir(parents=True)
        wanted.write_text("wanted")
        for other in others:
            (wanted.parent / f"{other}.png").touch()
        wanted.write_text("wanted")
        name = str(wanted.relative_to(root if short else export)) if layout != "below" or not short else wanted.name
        written = SPELLINGS[spelling](name)
        try:
            found = resolve_image_path(written, [root])
        except InputError:
            assert _is_ambiguous(wanted.stem, others)
            return
        is_written = Path(root, written).is_file()
        assert (
            (found == Path(root, written))
            if is_written
            else found.read_text() == "wanted" or _is_ambiguous(wanted.stem, others)
        )


def _is_ambiguous(stem: str, others: list[str]) -> bool:
    """Whether a spelling of the one name could be one of another."""
    return any(stem != other and _plain(stem) == _plain(other) for other in others)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(unquote(name)))


def _make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("a\\b.png", "a/b.png"),
        ("a%20b.png", "a b.png"),
        ("images/a.png", "a.png"),
        ("~/a.png", "a.png"),
        ("1a2b3c4d-a.png", "a.png"),
        ("e\u0301.png", "\u00e9.png"),
        ("file:/a.png", "a.png"),
    ],
)
def test_find_image_prefers_the_literal_name(tmp_path, name, wrong):
    root = _make(tmp_path / "images", name, wrong)
    assert resolve_image_path(name, [root]) == root / name
    (root / name).unlink()
    found = resolve_image_path(name, [root])
    assert name in ("~/a.png", "file:/a.png") or found.read_text() == wrong


def test_find_image_takes_the_first_root_that_has_the_name(tmp_path):
    first, second = _make(tmp_path / "1", "a.png"), _make(tmp_path / "2", "a.png", "b.png")
    assert resolve_image_path("a.png", [first, second]) == first / "a.png"
    assert resolve_image_path("b.png", [first, second]) == second / "b.png"
    assert resolve_image_path("c.png", [first, second]) == first / "c.png"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("C:\\old\\a.png", ("a.png", "images/a.png")),
        ("/old/sub/a.png", ("a.png", "sub/a.png")),
        ("\u00e9 \u1100\u1161.png", ("e\u0301 \uac00.png", "\u00e9 \uac00.png")),
    ],
)
def test_find_image_refuses_a_name_of_two_files_naming_both(tmp_path, name, files):
    root = _make(tmp_path, *files)
    with pytest.raises(InputError) as refused:
        resolve_image_path(name, [root])
    assert all(str(root / file) in str(refused.value) for file in files)


def test_find_image_counts_two_links_to_a_file_once(tmp_path):
    root = _make(tmp_path, "sub/a.png")
    (root / "a.png").symlink_to(root / "sub" / "a.png")
    assert resolve_image_path("/old/sub/a.png", [root]).samefile(root / "sub" / "a.png")


@pytest.mark.parametrize(
    "name", ["https://host/a.png", "HTTP://host/a.png", "s3://bucket/a.png", "data:image/png;base64,AA"]
)
def test_find_image_says_that_a_url_is_one(tmp_path, name):
    with pytest.raises(InputError, match="is a URL, not a file"):
        resolve_image_path(name, [_make(tmp_path, "a.png")])


@pytest.mark.parametrize(
    "name",
    ["%2e%2e/secret.png", "/data/local-files/?d=../secret.png", "/data/local-files/?d=%2Fsecret.png", "a\0.png", ""],
)
def test_find_image_does_not_leave_the_root_by_decoding(tmp_path, name):
    _make(tmp_path, "secret.png")
    root = _make(tmp_path / "root", "a.png")
    assert not resolve_image_path(name, [root]).is_file() if "\0" not in name else resolve_image_path(name, [root])


def test_find_image_follows_links_and_parents(tmp_path):
    store = _make(tmp_path / "store", "deep/a.png", "b.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(store / "deep")
    assert resolve_image_path("link\\a.png", [root]).samefile(store / "deep" / "a.png")
    assert resolve_image_path(normalize_name("./link//../b.png"), [root]).samefile(store / "b.png")


@pytest.mark.parametrize("name", ["../val/a.png", "..\\val\\a.png", "../a.png", "sub/../../a.png"])
def test_find_image_keeps_a_leading_parent(tmp_path, name):
    root = _make(tmp_path / "train", "a.png", "val/a.png", "sub/b.png")
    assert not resolve_image_path(name, [root]).is_file()
    _make(tmp_path, "a.png", "val/a.png")
    assert resolve_image_path(name, [root]).resolve() in (tmp_path / "a.png", tmp_path / "val/a.png")


@pytest.mark.parametrize(
    ("name", "is_noted"),
    [
        ("/data/val/a.png", True),
        ("D:\\val\\a.png", True),
        ("file:///data/val/a.png", True),
        ("/data/train/a.png", False),
        ("D:\\data\\train\\a.png", False),
        ("/data/sub/b.png", False),
        ("/data/upload/7/a.png", False),
        ("../../label-studio/data/media/upload/7/a.png", False),
        ("sub/media/upload/7/\u00e9.png", False),
        ("/data/local-files/?d=a.png", False),
        ("/data/local-files/?d=val/a.png", True),
        ("train/a.png", False),
    ],
)
def test_find_image_notes_a_file_of_another_folder(tmp_path, monkeypatch, caplog, name, is_noted):
    monkeypatch.setattr("sca.io.warnings_once._warned_keys", set())
    root = _make(tmp_path / "train", "a.png", "sub/b.png", "sub/media/upload/7/e\u0301.png")
    found = resolve_image_path(name, [root])
    assert found.is_file()
    assert [found.name in record.getMessage() for record in caplog.records] == [True] * is_noted


def test_find_image_expands_the_home_directory(tmp_path, monkeypatch):
    home = _make(tmp_path / "home", "data/a.png")
    monkeypatch.setenv("HOME", str(home))
    assert resolve_image_path("~/data/a.png", [tmp_path]) == home / "data" / "a.png"


def test_find_image_drops_the_prefix_of_an_upload_last(tmp_path):
    root = _make(tmp_path, "x.png", "images/1a2b3c4d-x.png")
    assert resolve_image_path("/data/upload/1/1a2b3c4d-x.png", [root]).name == "1a2b3c4d-x.png"
    assert resolve_image_path("/data/upload/1/99999999-x.png", [root]) == root / "x.png"


def test_possible_file_names_covers_tools_and_systems():
    assert list_possible_file_names("a\\e\u0301.png") >= {"\u00e9.png"}
    assert list_possible_file_names("/data/local-files/?d=sub%2Fmy%20x.png") >= {"my x.png"}
    assert list_possible_file_names("/data/upload/1/1a2b3c4d-x.png") >= {"1a2b3c4d-x.png", "x.png"}


@given(st.lists(PARTS, min_size=1, max_size=3), st.sampled_from(["/data/local-files/?d=", "https://host/x/"]))
def test_image_prefix_round_trip(parts, prefix):
    path = "/".join(parts)
    url = add_image_prefix(path, prefix)
    assert url.startswith(prefix)
    assert not set(url) & set(" #+&")
    assert remove_image_prefix(url, prefix) == path
    assert add_image_prefix(path, "") == remove_image_prefix(path, prefix) == path


def test_add_image_prefix_refuses_a_path_that_leaves_its_folder():
    with pytest.raises(ValueError, match="leaves the folder"):
        add_image_prefix("../a.png", "https://host/")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/box", "runs/center"], ["box", "center"]),
        (["runs/a/eval/predictions.jsonl", "runs/b/eval/predictions.jsonl"], ["a", "b"]),
        (["runs/a", "runs/a/b"], ["a", "b"]),
        (["runs/a/x", "runs/b/x", "runs/b/y"], ["a/x", "b/x", "b/y"]),
        (["runs/a", "runs/../runs/a"], ["1", "2"]),
        (["runs/a"], ["a"]),
    ],
)
def test_distinguish_paths_returns_what_differs(paths, names):
    assert distinguish_paths(paths) == names
