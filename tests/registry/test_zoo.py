"""Entries of the model zoo."""

import re

import pytest
from sca_registry import RegistryError, zoo


def test_zoo_lists_the_bundled_models():
    assert {"sca-tiny", "sca-street"} <= set(zoo.list_names())


@pytest.mark.parametrize("name", zoo.list_names())
def test_zoo_entry_has_all_fields(name):
    entry = zoo.get_entry(name)
    assert entry.name == name
    optional_fields = ("revision", "is_noncommercial", "subfolder", "download_bytes", "config")
    assert all(value for field, value in vars(entry).items() if field not in optional_fields)
    if entry.folder:
        assert entry.checkpoint == f"sca:bundled/{name}"  # package, folder inside
    else:
        assert entry.checkpoint in entry.source
        assert entry.checkpoint.count("/") == 1


@pytest.mark.parametrize(
    ("name", "size"),
    [("pam-1.5b", 4_040_000_000), ("pam-3b", 7_290_000_000), ("sca-gpt2-large-vg", None), ("sca-tiny", 0)],
)
def test_zoo_entry_has_the_size_of_its_download(name, size):
    entry = zoo.get_entry(name)
    assert entry.download_bytes == (4 * entry.parameters if size is None else size)


def test_zoo_suggests_a_model_for_a_typo():
    with pytest.raises(RegistryError, match=r"'sca-tinny'. Did you mean 'sca-tiny'\? Choose from: "):
        zoo.get_entry("sca-tinny")


def test_describe_domain_lists_models_for_photographs_smallest_first():
    for name, domain in (("sca-tiny", "synthetic scenes"), ("sca-street precision=bfloat16", "street photographs")):
        line = zoo.describe_domain(name)
        assert line.startswith(f"{name.partition(' ')[0]} is trained on {domain} only; for photographs: ")
        sizes = [
            zoo.get_entry(model_name).download_bytes for model_name in re.findall(r"([\w.-]+) \([\d.]+ GB\)", line)
        ]
        assert sizes == sorted(sizes)
        assert all(sizes)
        assert "\n" not in line
        (suggested_model,) = re.findall("`sca pull (.*?)`", line)
        assert zoo.get_entry(suggested_model).domain == zoo.PHOTOGRAPH_DOMAIN


@pytest.mark.parametrize("source", ["sca-gpt2-large-vg", "sam-vit-b+blip-base", "runs/sca-tiny", "owner/sca-tiny"])
def test_describe_domain_is_empty_for_other_models(source):
    assert zoo.describe_domain(source) == ""
