"""Location of the cache folder."""

from sca.io.cache import get_cache_folder


def test_get_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SCA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert get_cache_folder() == tmp_path / ".cache" / "sca"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert get_cache_folder() == tmp_path / "xdg" / "sca"
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "mine"))
    assert get_cache_folder() == tmp_path / "mine"
