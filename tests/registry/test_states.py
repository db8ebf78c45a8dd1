"""The state of a component: metadata when it is listed, an import when it is described."""

import pytest
from sca_registry import RegistryError, mixers
from sources import MIXER


def state(name):
    """Return the state and the reason of a mixer after its factory was imported."""
    entry = mixers.load_entry(name)
    return entry.state, entry.reason


def test_plugin_is_unchecked_in_a_listing_and_tried_when_described(site, states):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\nbad = shade:Absent\n", {"shade.py": MIXER})
    assert state("mean") == ("ok", "")
    assert state("bad")[0] == "broken"
    assert "Absent" in state("bad")[1]
    assert states(mixers)["mean"] == states(mixers)["bad"] == ("unchecked", "")


def test_a_built_in_and_what_code_registers_are_ok(code, states):
    mixers("mine")(lambda segmenter: None)
    assert states(mixers)["query"] == states(mixers)["mine"] == ("ok", "")


def test_a_mended_part_is_ok_again(site):
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": "1 / 0"})
    assert state("mean")[0] == "broken"
    site.write("shade.py", MIXER)
    assert state("mean") == ("ok", "")


def test_registry_writes_no_file(site, tmp_path, monkeypatch):
    for variable in ("SCA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "user"))
    site.install("shade", "[sca_mixers]\nmean = shade:Mean\nbad = shade:Absent\n", {"shade.py": MIXER})
    mixers.build("mean", None)
    mixers.get_all()
    mixers.list_entries()
    assert not (tmp_path / "user").exists()


FRAGILE = "def Fragile(segmenter, size=1):\n    raise {error}\n"


@pytest.mark.parametrize(
    ("error", "options", "own"),
    [
        ("RuntimeError('no')", {}, True),
        ("RuntimeError('no')", {"size": "big"}, False),
        ("MemoryError()", {}, False),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')", {}, False),
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', {}, False),
    ],
)
def test_a_part_is_not_blamed_for_its_options_or_for_the_machine(error, options, own, site):
    site.install("shade", "[sca_mixers]\nfragile = shade:Fragile\n", {"shade.py": FRAGILE.format(error=error)})
    with pytest.raises(RegistryError, match=r"mixer 'fragile' of shade 1\.0 cannot be built") as told:
        mixers.build("fragile", None, **options)
    assert ("with size='big': RuntimeError: no" in str(told.value)) == bool(options)
    assert ("pip install -U shade" in str(told.value)) == own


def test_a_part_of_this_package_is_not_broken_by_what_it_is_built_on():
    with pytest.raises(RegistryError, match="mixer 'query' cannot be built: AttributeError") as caught:
        mixers.build("query", None)
    assert "pip install" not in str(caught.value)


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
    assert state("mean")[0] == "needs extra: clip"


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
    assert state("mean")[0] == "broken"
