"""Published evaluation protocols by name, one TOML file each in `protocols/`.

A protocol names the datasets, prompts, metrics and options of one or more runs, and contains the scores that papers
report, so that they can be shown next to measured scores.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sca_registry import RegistryError, metrics
from sca_registry.errors import make_unknown_name_error

from sca.evaluation.predictions import PromptingOptions
from sca.io.score_format import PRINT_NOTE, format_score

if TYPE_CHECKING:
    from sca.io.terminal import Table

TOML_SUFFIX = ".toml"


@dataclass(frozen=True)
class ProtocolRun:
    """One evaluation of a protocol.

    Attributes:
        name: Name of the run.
        dataset: Registered name of the dataset.
        split: Split of the dataset.
        prompt_type: Prompt type, see `sca.evaluation.predictions.PROMPT_TYPES`.
        tasks: Tasks of every region.
        generation: Generation options.
        dataset_options: Dataset options.
        proposer: Registered name of the proposer, for dense captioning.
        scores: Names of the scores to compare.
        published: System -> its published values of `scores`, in the raw scale of this package; trailing ones may be
            missing.
    """

    name: str
    dataset: str
    split: str
    prompt_type: str = "box"
    tasks: tuple[str, ...] = ("caption",)
    generation: Mapping[str, Any] = field(default_factory=dict)
    dataset_options: Mapping[str, Any] = field(default_factory=dict)
    proposer: str | None = None
    scores: tuple[str, ...] = ()
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def prompting(self) -> PromptingOptions:
        """Prompt type, tasks and generation options of the run."""
        return PromptingOptions(self.prompt_type, tuple(self.tasks), generation=self.generation)


@dataclass(frozen=True)
class EvaluationProtocol:
    """An evaluation protocol of a paper.

    Attributes:
        name: Name of the protocol.
        summary: One line for lists.
        source: Papers with their arXiv numbers.
        metrics: Registered names of metrics.
        runs: Evaluations of the protocol.
        references: "all" or "first" references per region.
        tokenizer: "ptb" or "plain".
    """

    name: str
    summary: str
    source: str
    metrics: tuple[str, ...]
    runs: tuple[ProtocolRun, ...]
    references: str = "all"
    tokenizer: str = "ptb"

    @property
    def metric_options(self) -> dict[str, str]:
        """Options shared by all metrics of the protocol."""
        return {"references": self.references, "tokenizer": self.tokenizer}


def list_protocols() -> list[str]:
    """Return the names of the bundled protocols, sorted."""
    return sorted(
        file.name.removesuffix(TOML_SUFFIX)
        for file in _get_protocols_folder().iterdir()
        if file.name.endswith(TOML_SUFFIX)
    )


def read_protocol(name: str) -> EvaluationProtocol:
    """Read a bundled protocol.

    Args:
        name: Name of the protocol.

    Returns:
        The protocol.

    Raises:
        RegistryError: No protocol has this name.
    """
    if name not in list_protocols():
        raise make_unknown_name_error(f"unknown protocol {name!r}", name, list_protocols())
    table = tomllib.loads((_get_protocols_folder() / f"{name}{TOML_SUFFIX}").read_text("utf-8"))
    runs = tuple(ProtocolRun(**run) for run in table.pop("runs"))
    return EvaluationProtocol(name=name, runs=runs, **table)


def select_runs(protocol: EvaluationProtocol, names: Sequence[str] | None) -> EvaluationProtocol:
    """Select runs of a protocol.

    Args:
        protocol: The protocol.
        names: Names of runs; None selects all.

    Returns:
        The protocol with the selected runs, in their order.

    Raises:
        RegistryError: No run has one of the names.
    """
    known_names = [run.name for run in protocol.runs]
    for name in names or ():
        if name not in known_names:
            raise make_unknown_name_error(f"{protocol.name}: unknown run {name!r}", name, known_names)
    return replace(protocol, runs=tuple(run for run in protocol.runs if not names or run.name in names))


def find_available_metrics(
    protocol: EvaluationProtocol, metric_options: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return the metrics of a protocol that can be computed on this machine, and those that cannot.

    The only metric of a protocol is not checked, because its evaluation cannot skip it.

    Args:
        protocol: The protocol.
        metric_options: Options of metrics, such as `semantic.model`.

    Returns:
        The names of the available metrics, and those of the others.

    Raises:
        RegistryError: No metric can be computed; the error is that of the first.
    """
    if len(protocol.metrics) == 1:
        return list(protocol.metrics), []
    available, problems = [], {}
    for name in protocol.metrics:
        own_options = {
            key.partition(".")[2]: value
            for key, value in metric_options.items()
            if key.partition(".")[0] == name != key
        }
        try:
            metrics.build(name, **own_options)
            available.append(name)
        except RegistryError as error:
            problems[name] = error
    if problems and not available:
        raise next(iter(problems.values()))
    return available, list(problems)


def build_comparison_table(run: ProtocolRun, model: str, scores: Mapping[str, float], source: str) -> Table:
    """Build a table of the measured scores below the published ones, times 100.

    Args:
        run: Run of the protocol.
        model: Name of the measured model.
        scores: Measured scores by name.
        source: Source of the published scores.

    Returns:
        The table.
    """
    from sca.io.terminal import Table

    title = f"{run.name}, compared with published scores"
    table = Table(("model", *run.scores), title, run.scores, notes=[PRINT_NOTE, f"published: {source}"])
    for system, values in run.published.items():
        table.add_row(f"{system} (published)", *map(format_score, values))
    table.add_row(model, *(format_score(scores.get(name, math.nan)) for name in run.scores))
    return table


def _get_protocols_folder():
    return files("sca.evaluation") / "protocols"
