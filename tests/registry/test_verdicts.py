"""How a part was found to be is remembered between runs, and never gets in the way."""

import json
import subprocess
import sys

import pytest
from sca_registry import RegistryError, mixers, refresh, verdicts
from sca_registry.verdicts import Verdict, cache_folder, read_verdicts, write_verdict
from sources import MIXER


@pytest.fixture
def another_run(monkeypatch):
    """From here on, only what is on disk is known."""

    def forget():
        monkeypatch.setattr(verdicts, "_seen", {})
        refresh()

    return forget


def test_a_plugin_is_unchecked_until_it_is_used(site, states):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    assert states(mixers)["mean"] == ("unchecked", "")
    mixers.get("mean")
    assert states(mixers)["mean"] == ("ok", "")


def test_a_built_in_and_what_code_registers_are_ok(code, states):
    mixers("mine")(lambda segmenter: None)
    assert states(mixers)["query"] == states(mixers)["mine"] == ("ok", "")


def test_verdicts_outlive_the_process(site, states, another_run):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\nbad = shade:Absent\n", {"shade.py": MIXER})
    mixers.get("mean")
    with pytest.raises(RegistryError):
        mixers.get("bad")
    another_run()
    assert states(mixers)["mean"] == ("ok", "")
    assert states(mixers)["bad"][0] == "broken"
    assert "Absent" in states(mixers)["bad"][1]


def test_what_code_registers_is_not_judged_beyond_the_process(code, states, another_run):
    mixers("mine")(lambda segmenter: None)
    with pytest.raises(RegistryError, match="built a NoneType without"):
        mixers.build("mine", None)
    assert states(mixers)["mine"][0] == "broken"
    another_run()
    assert states(mixers)["mine"][0] == "ok"


def test_a_verdict_holds_for_one_installation(site, states, another_run):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER})
    mixers.get("mean")
    (site.folder / "shade-1.0.dist-info" / "RECORD").write_text("shade.py,sha256=another,\n")
    another_run()
    assert states(mixers)["mean"][0] == "unchecked"


@pytest.mark.parametrize("files", [("shade.py",), ("shade/__init__.py", "shade/parts.py")])
def test_state_of_a_part_is_unchecked_after_its_source_was_changed(files, site, states, another_run):
    module = files[-1].removesuffix(".py").replace("/", ".")
    broken = dict.fromkeys(files, "") | {files[-1]: "1 / 0"}
    site.install("shade", f"[sca_mixers]\nmean = {module}:Mean\n", broken)
    with pytest.raises(RegistryError):
        mixers.get("mean")
    another_run()
    assert states(mixers)["mean"][0] == "broken"
    site.write(files[-1], MIXER)
    another_run()
    assert states(mixers)["mean"] == ("unchecked", "")


def test_a_mended_part_is_ok_again(site, states):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": "1 / 0"})
    with pytest.raises(RegistryError):
        mixers.get("mean")
    site.write("shade.py", MIXER)
    mixers.get("mean")
    assert states(mixers)["mean"] == ("ok", "")


FRAGILE = "def Fragile(segmenter, size=1):\n    raise {error}\n"


@pytest.mark.parametrize(
    ("error", "options", "state"),
    [
        ("RuntimeError('no')", {}, "broken"),
        ("RuntimeError('no')", {"size": "big"}, "ok"),
        ("MemoryError()", {}, "ok"),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')", {}, "ok"),
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', {}, "ok"),
    ],
)
def test_a_part_is_not_blamed_for_its_options_or_for_the_machine(error, options, state, site, states):
    site.install("shade", "[sca_mixers]\nfragile = shade:Fragile\n", {"shade.py": FRAGILE.format(error=error)})
    with pytest.raises(RegistryError, match=r"mixer 'fragile' of shade 1\.0 cannot be built") as told:
        mixers.build("fragile", None, **options)
    assert states(mixers)["fragile"][0] == state
    assert ("with size='big': RuntimeError: no" in str(told.value)) == bool(options)
    assert ("pip install -U shade" in str(told.value)) == (state == "broken")


def test_a_part_of_this_package_is_not_broken_by_what_it_is_built_on(states):
    with pytest.raises(RegistryError, match="mixer 'query' cannot be built: AttributeError"):
        mixers.build("query", None)
    assert states(mixers)["query"] == ("ok", "")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": ["ok"]}', "\0", "3"])
def test_a_damaged_cache_is_an_empty_one(content, site, another_run):
    cache_folder().mkdir()
    (cache_folder() / "verdicts.json").write_text(content)
    another_run()
    assert read_verdicts() == {}
    write_verdict("key", Verdict("ok"))
    another_run()
    assert read_verdicts() == {"key": Verdict("ok")}


def test_a_cache_that_cannot_be_written_fails_nothing(site, states, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "file" / "cache"))
    site.install("shade", "[sca_mixers]\nbad = shade:Absent\n", {"shade.py": MIXER})
    with pytest.raises(RegistryError):
        mixers.get("bad")
    assert states(mixers)["bad"][0] == "broken"


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv("SCA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "sca"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sca"
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_two_processes_at_once_leave_a_whole_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path))
    script = (
        "import sys\nfrom sca_registry.verdicts import Verdict, write_verdict\n"
        "for n in range(100): write_verdict(f'{sys.argv[1]}{n}', Verdict('broken', 'x' * 50))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, who]) for who in "ab"]
    while any(process.poll() is None for process in running):
        file = tmp_path / "verdicts.json"
        assert not file.exists() or json.loads(file.read_text())
    assert [process.returncode for process in running] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["verdicts.json"]


EXTRA = "Provides-Extra: clip\nRequires-Dist: {wanted}>=1; extra == 'clip'\n"
CARD = "[mean]\nfactory = 'shade.parts:Mean'\nextra = 'clip'\n"


@pytest.fixture
def offer(site):
    """Installs a mixer `mean` whose card names the extra `clip`, which asks for `wanted`."""

    def install(wanted, source):
        files = {"shade/__init__.py": "", "shade/parts.py": source, "shade/mixers.toml": CARD}
        site.install("shade", "[sca_mixers]\nx = shade:mixers.toml\n", files, metadata=EXTRA.format(wanted=wanted))

    return install


@pytest.mark.parametrize("source", ["import nowhere_at_all", "def Mean(segmenter): import nowhere_at_all"])
def test_a_missing_extra_is_told_with_the_command_that_installs_it(source, offer, states):
    offer("nowhere-at-all", source)
    assert states(mixers)["mean"] == ("needs extra: clip", "pip install 'shade[clip]'")
    with pytest.raises(RegistryError, match=r"needs extra: clip. Install it: pip install 'shade\[clip\]'"):
        mixers.build("mean", None)


def test_an_extra_that_the_metadata_does_not_tell_of_is_found_out_by_use(site, states):
    files = {"shade/__init__.py": "", "shade/parts.py": "import nowhere_at_all", "shade/mixers.toml": CARD}
    site.install("shade", "[sca_mixers]\nx = shade:mixers.toml\n", files)
    assert states(mixers)["mean"][0] == "unchecked"
    with pytest.raises(RegistryError, match="needs extra: clip"):
        mixers.get("mean")
    assert states(mixers)["mean"][0] == "needs extra: clip"


@pytest.mark.parametrize("wanted", ["catalogue", "nowhere-at-all"])
def test_a_bug_is_not_taken_for_a_missing_extra(wanted, offer):
    offer(wanted, "import shade.absent")
    with pytest.raises(RegistryError, match=r"is broken: .*shade\.absent"):
        mixers.get("mean")


def test_an_extra_that_is_installed_is_not_missing(offer, states):
    offer("catalogue", "import nowhere_at_all")
    assert states(mixers)["mean"] == ("unchecked", "")
    with pytest.raises(RegistryError, match=r"is broken: .*nowhere_at_all"):
        mixers.get("mean")
    assert states(mixers)["mean"][0] == "broken"
