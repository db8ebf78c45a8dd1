"""The conformance kit: tries a part against the promises of its contract, on tensors that fit into a thimble.

    for finding in check("mixer", "query", depth=1):
        print(finding)

A promise is one function under `@promise(...)`: its name is the check's, the first paragraph of its docstring says what
is expected, and it returns None if the promise is kept, else what was found instead. The parts upstream are stand-ins
that have what the contract lists and nothing more, so a part that reaches for more is found out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from sca_registry import registry
from sca_registry.contracts import KINDS

from sca.testing.conformance import (  # noqa: F401 (their promises)
    captioners,
    common,
    datasets,
    encoders,
    language_models,
    metrics,
    mixers,
    proposers,
    segmenters,
)
from sca.testing.conformance.promises import PROMISES, DoesNotApply, Finding, Promise
from sca.testing.conformance.trials import TRIALS, Trial

__all__ = ["PROMISES", "Finding", "check"]

ELSEWHERE = {"conformance", "torch", "transformers", "timm", "open_clip", "sca_registry"}  # folders


def check(kind: str, part: str | Callable[..., Any], /, **options: Any) -> list[Finding]:
    """One finding for each promise of the kind ("mixer" or "mixers"), those that every kind has first.

    part: a registered name, or a factory. options: of the factory; the dataset's `split` too (default "val"). A part
    that cannot be built, or does not run, is tried no further. Nothing that the part does wrong is raised, except
    KeyboardInterrupt. Random state is put back as it was.

    Raises RegistryError if there is no such kind.
    """
    described = registry(kind).kind
    trial = TRIALS.get(described.plural, Trial)(described.plural, part, options)
    with torch.random.fork_rng(devices=[]):
        findings = []
        promises = [each for each in PROMISES if described.plural in each.kinds]
        for kept in sorted(promises, key=lambda each: each.keeps.__module__ != common.__name__):
            findings.append(_try(kept, trial))
            if kept.keeps in (common.builds, common.runs) and not findings[-1].passed:
                break
    return findings


def _where(error: BaseException) -> str:
    """The last line of somebody's own code that an error passed through, that of libraries and of this kit aside."""
    frames = [frame for frame in extract_tb(error.__traceback__) if not set(Path(frame.filename).parts) & ELSEWHERE]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _try(kept: Promise, trial: Trial) -> Finding:
    written = kept.written or f"sca_registry.contracts.{KINDS[trial.kind].protocol.__name__}"
    torch.manual_seed(0)
    try:
        problem = kept.keeps(trial)
    except DoesNotApply as reason:
        return Finding(kept.name, True, kept.expected, f"does not apply: {reason}", written)
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}{_where(error)}"
    return Finding(kept.name, problem is None, kept.expected, problem or "as expected", written)
