"""Published protocols by name: what to ask of which data, how to score it, and what papers have reported.

One TOML file each in `protocols/`. A protocol is one or several runs; what papers print stands beside what is measured.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sca_registry import RegistryError, metrics
from sca_registry.errors import make_unknown_name_error

from sca.evaluation.predictions import PromptingOptions

if TYPE_CHECKING:
    from sca.io.terminal import Table

TOML_SUFFIX = ".toml"


@dataclass(frozen=True)
class ProtocolRun:
    """One evaluation of a protocol. published: for each system the scores named by `columns`, or the first of them."""

    name: str
    dataset: str
    split: str
    prompt: str = "box"
    tasks: tuple[str, ...] = ("caption",)
    generation: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    proposer: str | None = None
    columns: tuple[str, ...] = ()
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def prompting(self) -> PromptingOptions:
        return PromptingOptions(self.prompt, tuple(self.tasks), generation=self.generation)


@dataclass(frozen=True)
class EvaluationProtocol:
    name: str
    summary: str
    source: str
    metrics: tuple[str, ...]
    runs: tuple[ProtocolRun, ...]
    references: str = "all"
    tokenizer: str = "ptb"

    @property
    def metric_options(self) -> dict[str, str]:
        return {"references": self.references, "tokenizer": self.tokenizer}


def list_protocols() -> list[str]:
    return sorted(
        file.name.removesuffix(TOML_SUFFIX)
        for file in _get_protocols_folder().iterdir()
        if file.name.endswith(TOML_SUFFIX)
    )


def read_protocol(name: str) -> EvaluationProtocol:
    """RegistryError if there is none of this name."""
    if name not in list_protocols():
        raise make_unknown_name_error(f"no protocol {name!r}", name, list_protocols())
    table = tomllib.loads((_get_protocols_folder() / f"{name}{TOML_SUFFIX}").read_text("utf-8"))
    runs = tuple(ProtocolRun(**run) for run in table.pop("runs"))
    return EvaluationProtocol(name=name, runs=runs, **table)


def available_metrics(protocol: EvaluationProtocol, settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the metrics of a protocol that can be computed on this machine, and the others.

    Args:
        protocol: The protocol.
        settings: Options of metrics, such as `semantic.model`.

    Raises:
        RegistryError: No metric can be computed; the message is that of the first.
    """
    available, problems = [], {}
    for name in protocol.metrics:
        own = {key.partition(".")[2]: value for key, value in settings.items() if key.partition(".")[0] == name != key}
        try:
            metrics.build(name, **own)
            available.append(name)
        except RegistryError as error:
            problems[name] = error
    if problems and not available:
        raise next(iter(problems.values()))
    return available, list(problems)


def build_comparison_table(run: ProtocolRun, model: str, scores: Mapping[str, float], source: str) -> Table:
    """What was measured, with what was published above it."""
    from sca.io.terminal import Table

    title = f"{run.name}, beside what was published"
    table = Table(("model", *run.columns), title, run.columns, notes=[f"published: {source}"])
    for system, values in run.published.items():
        table.add_row(f"{system} (published)", *(f"{value:.3f}" for value in values))
    measured = (scores.get(column) for column in run.columns)
    table.add_row(model, *("–" if value is None or value != value else f"{value:.3f}" for value in measured))
    return table


def _get_protocols_folder():
    return files("sca.evaluation") / "protocols"
