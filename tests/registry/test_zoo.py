"""Models by name."""

import pytest
from sca_registry import RegistryError, zoo


def test_the_first_models_are_named():
    assert {"sca-tiny", "sca-street"} <= set(zoo.names())


@pytest.mark.parametrize("name", zoo.names())
def test_an_entry_says_everything_that_a_user_has_to_know(name):
    entry = zoo.get(name)
    assert entry.name == name
    assert all(value for field, value in vars(entry).items() if field != "revision")  # not known for all
    if entry.folder:
        assert entry.checkpoint == f"sca:checkpoints/{name}"  # package, folder inside
    else:
        assert entry.checkpoint in entry.source
        assert entry.checkpoint.count("/") == 1


def test_a_typo_is_answered_with_the_model_meant():
    with pytest.raises(RegistryError, match=r"'sca-tinny'. Did you mean 'sca-tiny'\? There are: "):
        zoo.get("sca-tinny")
