"""Image names in files: resolved to the right image, or rejected."""

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

NAME_PARTS = st.text(st.sampled_from("ab é각Å%20 +#&~-"), min_size=1, max_size=6).filter(
    lambda part: part.strip(" ") == part
)
EXPORT_FOLDERS = {  # of an export, and the root that its names are looked up in
    "beside": ("", ""),
    "below": ("images", ""),
    "same": ("images", "images"),
    "deep": ("images/train", "images"),
}
NAME_SPELLINGS = {
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
    stem=NAME_PARTS,
    others=st.lists(NAME_PARTS, max_size=3),
    layout=st.sampled_from(sorted(EXPORT_FOLDERS)),
    spelling=st.sampled_from(sorted(NAME_SPELLINGS)),
    decomposed=st.booleans(),
    short=st.booleans(),
)
@pytest.mark.slow
def test_resolve_image_path_resolves_every_spelling_or_rejects_ambiguity(
    stem, others, layout, spelling, decomposed, short
):
    folder, root_name = EXPORT_FOLDERS[layout]
    with TemporaryDirectory() as temporary:
        export = Path(temporary, "export")
        root = export / root_name
        image_path = (export / folder).joinpath(unicodedata.normalize("NFD" if decomposed else "NFC", f"{stem}.png"))
        image_path.parent.mkdir(parents=True)
        image_path.write_text("wanted")
        for other_stem in others:
            (image_path.parent / f"{other_stem}.png").touch()
        image_path.write_text("wanted")
        name = (
            str(image_path.relative_to(root if short else export))
            if layout != "below" or not short
            else image_path.name
        )
        spelled_name = NAME_SPELLINGS[spelling](name)
        try:
            resolved = resolve_image_path(spelled_name, [root])
        except InputError:
            assert _is_ambiguous(image_path.stem, others)
            return
        is_literal = Path(root, spelled_name).is_file()
        assert (
            (resolved == Path(root, spelled_name))
            if is_literal
            else resolved.read_text() == "wanted" or _is_ambiguous(image_path.stem, others)
        )


def _is_ambiguous(stem: str, other_stems: list[str]) -> bool:
    """Return whether two names have a common spelling."""
    return any(
        stem != other_stem and _normalize_spelling(stem) == _normalize_spelling(other_stem)
        for other_stem in other_stems
    )


def _normalize_spelling(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(unquote(unicodedata.normalize("NFC", name))))


def _create_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


@pytest.mark.parametrize(
    ("name", "other_name"),
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
def test_resolve_image_path_prefers_the_literal_name(tmp_path, name, other_name):
    root = _create_files(tmp_path / "images", name, other_name)
    assert resolve_image_path(name, [root]) == root / name
    (root / name).unlink()
    resolved = resolve_image_path(name, [root])
    assert name in ("~/a.png", "file:/a.png") or resolved.read_text() == other_name


def test_resolve_image_path_uses_the_first_root_with_the_name(tmp_path):
    first_root, second_root = _create_files(tmp_path / "1", "a.png"), _create_files(tmp_path / "2", "a.png", "b.png")
    assert resolve_image_path("a.png", [first_root, second_root]) == first_root / "a.png"
    assert resolve_image_path("b.png", [first_root, second_root]) == second_root / "b.png"
    assert resolve_image_path("c.png", [first_root, second_root]) == first_root / "c.png"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("C:\\old\\a.png", ("a.png", "images/a.png")),
        ("/old/sub/a.png", ("a.png", "sub/a.png")),
        ("\u00e9 \u1100\u1161.png", ("e\u0301 \uac00.png", "\u00e9 \uac00.png")),
    ],
)
def test_resolve_image_path_rejects_a_name_of_two_files_and_names_both(tmp_path, name, files):
    root = _create_files(tmp_path, *files)
    with pytest.raises(InputError) as error_info:
        resolve_image_path(name, [root])
    assert all(str(root / file) in str(error_info.value) for file in files)


def test_resolve_image_path_accepts_two_links_to_one_file(tmp_path):
    root = _create_files(tmp_path, "sub/a.png")
    (root / "a.png").symlink_to(root / "sub" / "a.png")
    assert resolve_image_path("/old/sub/a.png", [root]).samefile(root / "sub" / "a.png")


@pytest.mark.parametrize(
    "name", ["https://host/a.png", "HTTP://host/a.png", "s3://bucket/a.png", "data:image/png;base64,AA"]
)
def test_resolve_image_path_rejects_urls(tmp_path, name):
    with pytest.raises(InputError, match="is a URL, not a file"):
        resolve_image_path(name, [_create_files(tmp_path, "a.png")])


@pytest.mark.parametrize(
    "name",
    ["%2e%2e/secret.png", "/data/local-files/?d=../secret.png", "/data/local-files/?d=%2Fsecret.png", "a\0.png", ""],
)
def test_resolve_image_path_does_not_leave_the_root_by_decoding(tmp_path, name):
    _create_files(tmp_path, "secret.png")
    root = _create_files(tmp_path / "root", "a.png")
    assert not resolve_image_path(name, [root]).is_file() if "\0" not in name else resolve_image_path(name, [root])


def test_resolve_image_path_follows_symlinks_and_parent_folders(tmp_path):
    store = _create_files(tmp_path / "store", "deep/a.png", "b.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(store / "deep")
    assert resolve_image_path("link\\a.png", [root]).samefile(store / "deep" / "a.png")
    assert resolve_image_path(normalize_name("./link//../b.png"), [root]).samefile(store / "b.png")


@pytest.mark.parametrize("name", ["../val/a.png", "..\\val\\a.png", "../a.png", "sub/../../a.png"])
def test_resolve_image_path_keeps_leading_parent_folders(tmp_path, name):
    root = _create_files(tmp_path / "train", "a.png", "val/a.png", "sub/b.png")
    assert not resolve_image_path(name, [root]).is_file()
    _create_files(tmp_path, "a.png", "val/a.png")
    assert resolve_image_path(name, [root]).resolve() in (tmp_path / "a.png", tmp_path / "val/a.png")


@pytest.mark.parametrize(
    ("name", "warns"),
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
def test_resolve_image_path_warns_about_a_file_of_another_folder(tmp_path, monkeypatch, caplog, name, warns):
    monkeypatch.setattr("sca.io.warnings_once._warned_keys", set())
    root = _create_files(tmp_path / "train", "a.png", "sub/b.png", "sub/media/upload/7/e\u0301.png")
    resolved = resolve_image_path(name, [root])
    assert resolved.is_file()
    assert [resolved.name in record.getMessage() for record in caplog.records] == [True] * warns


def test_resolve_image_path_expands_the_home_directory(tmp_path, monkeypatch):
    home = _create_files(tmp_path / "home", "data/a.png")
    monkeypatch.setenv("HOME", str(home))
    assert resolve_image_path("~/data/a.png", [tmp_path]) == home / "data" / "a.png"


def test_resolve_image_path_drops_an_upload_prefix_last(tmp_path):
    root = _create_files(tmp_path, "x.png", "images/1a2b3c4d-x.png")
    assert resolve_image_path("/data/upload/1/1a2b3c4d-x.png", [root]).name == "1a2b3c4d-x.png"
    assert resolve_image_path("/data/upload/1/99999999-x.png", [root]) == root / "x.png"


def test_list_possible_file_names_covers_labeling_tools_and_systems():
    assert list_possible_file_names("a\\e\u0301.png") >= {"\u00e9.png"}
    assert list_possible_file_names("/data/local-files/?d=sub%2Fmy%20x.png") >= {"my x.png"}
    assert list_possible_file_names("/data/upload/1/1a2b3c4d-x.png") >= {"1a2b3c4d-x.png", "x.png"}


@given(st.lists(NAME_PARTS, min_size=1, max_size=3), st.sampled_from(["/data/local-files/?d=", "https://host/x/"]))
def test_remove_image_prefix_reverses_add_image_prefix(parts, prefix):
    path = "/".join(parts)
    url = add_image_prefix(path, prefix)
    assert url.startswith(prefix)
    assert not set(url) & set(" #+&")
    assert remove_image_prefix(url, prefix) == path
    assert add_image_prefix(path, "") == remove_image_prefix(path, prefix) == path


def test_add_image_prefix_rejects_a_path_outside_its_folder():
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
def test_distinguish_paths_returns_the_distinct_parts(paths, names):
    assert distinguish_paths(paths) == names
