"""Options are checked before the call of a factory, and its result is checked against the contract."""

from pathlib import Path

import pytest
from plugin_sources import MIXER_SOURCE
from sca_registry import RegistryError, datasets, mixers
from sca_registry.contracts import COMPONENT_KINDS
from sca_registry.options import REQUIRED, check_options, is_text_option
from sca_registry.registry import KINDS_WITHOUT_TEMPLATE

from sca.testing.scaffold import TEMPLATE_KINDS


@pytest.fixture
def install_mixer(plugin_site):
    """Function that installs one mixer `mine` from the source of its factory `make`."""
    return lambda source: plugin_site.install_distribution(
        "shade", "[sca_mixers]\nmine = shade:make\n", {"shade.py": source}
    )


def test_build_lists_options_and_defaults_for_an_unknown_option(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    with pytest.raises(
        RegistryError, match=r"mixer 'mean' has no option 'dpeth'. Did you mean 'depth'\? .*: depth=1\."
    ):
        mixers.build("mean", None, dpeth=2)


def test_upstream_component_is_not_an_option(plugin_site):
    plugin_site.install_distribution("shade", "[sca_mixers]\nmean = shade:Mean\n", {"shade.py": MIXER_SOURCE})
    with pytest.raises(RegistryError, match="no option 'segmenter'"):
        mixers.build("mean", None, segmenter=2)
    assert list(mixers.load_entry("mean").options) == ["depth"]


def test_build_does_not_call_the_factory_with_an_unknown_option(install_mixer):
    install_mixer("def make(segmenter, depth=1): raise AssertionError('called')")
    with pytest.raises(RegistryError, match="no option 'width'"):
        mixers.build("mine", None, width=2)


def test_build_requires_options_without_defaults(install_mixer):
    install_mixer("def make(segmenter, checkpoint, *, depth=1): pass")
    assert mixers.load_entry("mine").options == {"checkpoint": REQUIRED, "depth": 1}
    with pytest.raises(RegistryError, match=r"requires the option 'checkpoint'. Choose from: checkpoint, depth=1"):
        mixers.build("mine", None)


def test_build_passes_any_option_to_a_factory_with_kwargs(install_mixer):
    install_mixer(MIXER_SOURCE + "\n    def make(segmenter, **options): return Mean(segmenter, options['depth'])\n")
    assert mixers.build("mine", None, depth=4).depth == 4


def test_build_accepts_an_option_called_name(install_mixer):
    install_mixer(MIXER_SOURCE + "\n    def make(segmenter, name): return Mean(segmenter, name)\n")
    assert mixers.build("mine", None, name="n").depth == "n"


def test_build_without_upstream_arguments_raises_assertion_error(plugin_site):
    with pytest.raises(AssertionError):
        mixers.build("query")
    with pytest.raises(AssertionError):
        datasets.build("scenes", split="train")


def test_build_names_the_missing_attributes_of_a_component(install_mixer):
    install_mixer(
        "class Half:\n    hidden_size = 3\n    def __call__(self): pass\n\ndef make(segmenter): return Half()\n"
    )
    template_hint = "`sca plugin new mixer NAME` writes a template"
    with pytest.raises(
        RegistryError,
        match=rf"returned a Half without num_queries, uses_grid; .*contracts\.Mixer; {template_hint}$",
    ):
        mixers.build("mine", None)


def test_build_suggests_a_template_for_each_kind_that_has_one():
    kinds = {kind.singular for plural, kind in COMPONENT_KINDS.items() if plural not in KINDS_WITHOUT_TEMPLATE}
    assert kinds == {*TEMPLATE_KINDS}


@pytest.mark.parametrize("failure", ["RuntimeError('no')", "SystemExit(1)", "ImportError('no')"])
def test_build_reports_a_constructor_failure_as_a_fault_of_the_plugin(failure, install_mixer):
    install_mixer(f"def make(segmenter, depth=1): raise {failure}")
    with pytest.raises(RegistryError) as caught:
        mixers.build("mine", None)
    assert caught.value.__cause__ is not None
    reason = failure.replace("('", ": ").replace("')", "").replace("(1)", ": 1")
    assert str(caught.value) == f"mixer 'mine' of shade 1.0 cannot be built: {reason}. Try: pip install -U shade"


def test_build_reports_a_rejected_value_without_suggesting_an_upgrade(install_mixer):
    install_mixer("def make(segmenter, depth=1): raise ValueError('depth must be even')")
    with pytest.raises(RegistryError, match=r"cannot be built: depth must be even$"):
        mixers.build("mine", None, depth=1)


def test_build_propagates_keyboard_interrupt(install_mixer):
    install_mixer("def make(segmenter): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        mixers.build("mine", None)


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("x: 'str | Path | None' = None", True),
        ("x: str", True),
        ("x: str | None = None", True),
        ("x: Optional[str] = None", True),
        ("x: 'pathlib.Path'", True),
        ("x: 'os.PathLike[str] | str'", True),
        ("x='a'", True),
        ("x: 'str | int' = 1", False),
        ("x: 'list[str]' = ()", False),
        ("x: 'str | list[str]' = ()", False),
        ("x: int = 1", False),
        ("x: None = None", False),
        ("x=1", False),
        ("x", False),
        ("**x: str", False),
    ],
)
def test_is_text_option_follows_the_annotation(parameter, expected):
    namespace = {}
    exec(
        f"from pathlib import Path\nfrom typing import Optional\ndef make(upstream: str, {parameter}): pass", namespace
    )
    assert is_text_option(namespace["make"], 1, "x") == expected
    assert not is_text_option(namespace["make"], 1, "upstream")
    assert not is_text_option(namespace["make"], 1, "other")


@pytest.mark.parametrize(
    ("annotation", "wrong_value", "right_value", "expected_type"),
    [
        ("int", "a", 2, "an integer"),
        ("int | None", "a", None, "an integer or None"),
        ("'int | None'", 1.5, 2, "an integer or None"),
        ("Optional[float]", "a", 1, "a number or None"),
        ("'Optional[float]'", "a", 1.5, "a number or None"),
        ("'typing.Optional[float]'", "a", None, "a number or None"),
        ("Union[int, None]", "a", 2, "an integer or None"),
        ("'Union[bool, int]'", "a", True, "an integer or true or false"),
        ("bool", 1, True, "true or false"),
        ("str", 5, "a", "a string"),
        ("str | Path | None", 5, Path("a"), "a string or None"),
        ("'str | bool'", 5, "a", "true or false or a string"),
    ],
)
def test_check_options_rejects_values_of_the_wrong_type(annotation, wrong_value, right_value, expected_type):
    namespace = {}
    exec(
        "import typing\nfrom pathlib import Path\nfrom typing import Optional, Union\n"
        f"def make(upstream, x: {annotation} = ...): pass",
        namespace,
    )
    check_options("mixer 'mine'", namespace["make"], 1, {"x": right_value})
    with pytest.raises(RegistryError, match=rf"mixer 'mine': x is {wrong_value!r}; expected {expected_type}$"):
        check_options("mixer 'mine'", namespace["make"], 1, {"x": wrong_value})


@pytest.mark.parametrize(
    "annotation", ["list[int]", "'int | list[int]'", "int | list[int]", "Literal['int']", "object"]
)
def test_check_options_ignores_annotations_that_it_does_not_support(annotation):
    namespace = {}
    exec(f"from typing import Literal\ndef make(upstream, x: {annotation} = ...): pass", namespace)
    check_options("mixer 'mine'", namespace["make"], 1, {"x": "anything"})
