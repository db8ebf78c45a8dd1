"""Models by name."""

import re

import pytest
from sca_registry import RegistryError, zoo


def test_the_first_models_are_named():
    assert {"sca-tiny", "sca-street"} <= set(zoo.list_names())


@pytest.mark.parametrize("name", zoo.list_names())
def test_an_entry_says_everything_that_a_user_has_to_know(name):
    entry = zoo.get_entry(name)
    assert entry.name == name
    assert all(value for field, value in vars(entry).items() if field != "revision")  # not known for all
    if entry.folder:
        assert entry.checkpoint == f"sca:bundled/{name}"  # package, folder inside
    else:
        assert entry.checkpoint in entry.source
        assert entry.checkpoint.count("/") == 1


def test_a_typo_is_answered_with_the_model_meant():
    with pytest.raises(RegistryError, match=r"'sca-tinny'. Did you mean 'sca-tiny'\? Choose from: "):
        zoo.get_entry("sca-tinny")


def test_describe_domain_names_the_models_for_photographs_smallest_first():
    for name, domain in (("sca-tiny", "drawn scenes"), ("sca-street dtype=bfloat16", "street photographs")):
        line = zoo.describe_domain(name)
        assert line.startswith(f"{name.partition(' ')[0]} is trained on {domain} only; for photographs: ")
        sizes = [zoo.get_entry(found).download_bytes for found in re.findall(r"([\w-]+) \([\d.]+ GB\)", line)]
        assert sizes == sorted(sizes)
        assert all(sizes)
        assert "\n" not in line
        (pulled,) = re.findall("`sca pull (.*?)`", line)
        assert zoo.get_entry(pulled).domain == zoo.PHOTOGRAPH_DOMAIN


@pytest.mark.parametrize("source", ["sca-gpt2-large-vg", "sam-vit-b+blip-base", "runs/sca-tiny", "owner/sca-tiny"])
def test_describe_domain_says_nothing_of_other_models(source):
    assert zoo.describe_domain(source) == ""
