"""`sca export`: a portable checkpoint, its permissions, and an unknown layout."""

import shutil

import torch

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


def test_export_converts_models_to_the_precision_of_onnx(build_small_model, run_sca, working_folder, monkeypatch):
    write_language_model(build_small_model(), working_folder / "lm")
    language_model = {"name": "hf", "weights": str(working_folder / "lm"), "dtype": "bfloat16"}
    sca.save(build_small_model(language_model=language_model), working_folder / "native")
    models = []
    for name in ("onnx_export.write_onnx_graphs", "portable.write_portable_checkpoint"):
        monkeypatch.setattr(f"sca.checkpoints.{name}", lambda model, folder: models.append(model))
    for layout in ("onnx", "portable"):
        run_sca("export", "./native", "out", "--layout", layout, "--allow-external")
    dtypes = [{parameter.dtype for parameter in model.parameters()} for model in models]
    assert dtypes == [{torch.float32}, {torch.float32, torch.bfloat16}]
