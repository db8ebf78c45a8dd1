"""`sca export`: a portable checkpoint, its permissions, and an unknown layout."""

import shutil

import sca
from sca.checkpoints.export import write_language_model


def test_export_writes_a_portable_checkpoint_only_if_external_files_are_allowed(
    build_small_model, run_sca, get_sca_error, working_folder
):
    write_language_model(build_small_model(), working_folder / "lm")
    model = build_small_model(language_model={"name": "hf", "weights": str(working_folder / "lm")})
    sca.save(model, working_folder / "native")
    arguments = ("export", "./native", "portable", "--layout", "portable")
    assert "--allow-external" in get_sca_error(2, *arguments)
    assert not (working_folder / "portable").exists()
    assert run_sca(*arguments, "--allow-external").err == ["sca: wrote portable"]
    shutil.rmtree(working_folder / "lm")
    sca.load("./portable")


def test_export_rejects_an_unknown_layout(get_sca_error):
    message = get_sca_error(2, "export", "sca-tiny", "out", "--layout", "portabel")
    assert message.startswith("unknown layout 'portabel'")
