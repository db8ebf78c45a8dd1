"""The state of a component: metadata when it is listed, an import when it is described."""

import pytest
from plugin_sources import MIXER_SOURCE
from sca_registry import RegistryError, mixers


def get_state(name):
    """Return the state and the reason of a mixer after its factory was imported."""
    entry = mixers.load_entry(name)
    return entry.state, entry.reason


def test_plugin_state_is_unchecked_when_listed_and_checked_when_loaded(plugin_site, get_states):
    plugin_site.install_distribution(
        "shade", "[sca_mixers]\nmean = shade:Mean\nbad = shade:Absent\n", {"shade.py": MIXER_SOURCE}
    )
    assert get_state("mean") == ("ok", "")
    assert get_state("bad")[0] == "broken"
    assert "Absent" in get_state("bad")[1]
    assert get_states(mixers)["mean"] == get_states(mixers)["bad"] == ("unchecked", "")


def test_builtin_and_registered_components_have_state_ok(isolated_registry, get_states):
    mixers("mine")(lambda segmenter: None)
    assert get_states(mixers)["query"] == get_states(mixers)["mine"] == ("ok", "")


def test_repaired_plugin_has_state_ok_again(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": "1 / 0"})
    assert get_state("mean")[0] == "broken"
    plugin_site.write("shade.py", MIXER_SOURCE)
    assert get_state("mean") == ("ok", "")


def test_registry_writes_no_files(plugin_site, tmp_path, monkeypatch):
    for environment_variable in ("SCA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(environment_variable, str(tmp_path / "user"))
    plugin_site.install_distribution(
        "shade", "[sca_mixers]\nmean = shade:Mean\nbad = shade:Absent\n", {"shade.py": MIXER_SOURCE}
    )
    mixers.build("mean", None)
    mixers.get_all()
    mixers.list_entries()
    assert not (tmp_path / "user").exists()


FAILING_FACTORY_SOURCE = "def Fragile(segmenter, size=1):\n    raise {error}\n"


@pytest.mark.parametrize(
    ("error", "options", "is_plugin_fault"),
    [
        ("RuntimeError('no')", {}, True),
        ("RuntimeError('no')", {"size": "big"}, False),
        ("MemoryError()", {}, False),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')", {}, False),
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', {}, False),
    ],
)
def test_build_error_suggests_an_upgrade_only_for_faults_of_the_plugin(error, options, is_plugin_fault, plugin_site):
    plugin_site.install_distribution(
        "shade", "[sca_mixers]\nfragile = shade:Fragile\n", {"shade.py": FAILING_FACTORY_SOURCE.format(error=error)}
    )
    with pytest.raises(RegistryError, match=r"mixer 'fragile' of shade 1\.0 cannot be built") as caught:
        mixers.build("fragile", None, **options)
    assert ("with size='big': RuntimeError: no" in str(caught.value)) == bool(options)
    assert ("pip install -U shade" in str(caught.value)) == is_plugin_fault


def test_build_error_of_a_builtin_component_suggests_no_installation():
    with pytest.raises(RegistryError, match="mixer 'query' cannot be built: AttributeError") as caught:
        mixers.build("query", None)
    assert "pip install" not in str(caught.value)


EXTRA_METADATA = "Provides-Extra: clip\nRequires-Dist: {requirement}>=1; extra == 'clip'\n"
CARD_WITH_EXTRA = "[mean]\nfactory = 'shade.parts:Mean'\nextra = 'clip'\n"


@pytest.fixture
def install_mixer_with_extra(plugin_site):
    """Function that installs a mixer `mean` whose card names the extra `clip`, which requires `requirement`."""

    def install_mixer(requirement, source):
        files = {"shade/__init__.py": "", "shade/parts.py": source, "shade/mixers.toml": CARD_WITH_EXTRA}
        plugin_site.install_distribution(
            "shade",
            "[sca_mixers]\nx = shade:mixers.toml\n",
            files,
            metadata=EXTRA_METADATA.format(requirement=requirement),
        )

    return install_mixer


@pytest.mark.parametrize("source", ["import nowhere_at_all", "def Mean(segmenter): import nowhere_at_all"])
def test_missing_extra_is_reported_with_its_install_command(source, install_mixer_with_extra, get_states):
    install_mixer_with_extra("nowhere-at-all", source)
    assert get_states(mixers)["mean"] == ("needs extra: clip", "pip install 'shade[clip]'")
    with pytest.raises(RegistryError, match=r"needs the extra 'clip'; install it with: pip install 'shade\[clip\]'"):
        mixers.build("mean", None)


def test_missing_extra_without_metadata_is_detected_on_import(plugin_site, get_states):
    files = {"shade/__init__.py": "", "shade/parts.py": "import nowhere_at_all", "shade/mixers.toml": CARD_WITH_EXTRA}
    plugin_site.install_distribution("shade", "[sca_mixers]\nx = shade:mixers.toml\n", files)
    assert get_states(mixers)["mean"][0] == "unchecked"
    with pytest.raises(RegistryError, match="needs the extra 'clip'"):
        mixers.get("mean")
    assert get_state("mean")[0] == "needs extra: clip"


@pytest.mark.parametrize("requirement", ["catalogue", "nowhere-at-all"])
def test_import_error_inside_a_plugin_is_not_reported_as_a_missing_extra(requirement, install_mixer_with_extra):
    install_mixer_with_extra(requirement, "import shade.absent")
    with pytest.raises(RegistryError, match=r"is broken: .*shade\.absent"):
        mixers.get("mean")


def test_installed_extra_is_not_reported_as_missing(install_mixer_with_extra, get_states):
    install_mixer_with_extra("catalogue", "import nowhere_at_all")
    assert get_states(mixers)["mean"] == ("unchecked", "")
    with pytest.raises(RegistryError, match=r"is broken: .*nowhere_at_all"):
        mixers.get("mean")
    assert get_state("mean")[0] == "broken"
