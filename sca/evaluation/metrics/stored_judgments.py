"""Scores of captions that were judged before, such as by the evaluation of DLC-Bench."""

from __future__ import annotations

from collections.abc import Sequence

from sca_registry.contracts import MetricOutput

from sca.evaluation.judgments import Judgment, make_judgment_output
from sca.evaluation.records import Record, require_records


class StoredJudgments:
    """Scores of the judgments in the records, see `sca.evaluation.judgments`. No judge is needed.

    `judgments` of a record is a list of objects with a `kind` ("recognition", "positive" or "negative") and a `score`;
    `sca.evaluation.judge_results` reads them from the files of DLC-Bench.
    """

    required_fields: tuple[str, ...] = ("judgments",)

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        judged_records = require_records(records, self.required_fields, "judgments")
        judgments = [
            [Judgment(each["kind"], float(each["score"])) for each in record["judgments"]] for record in judged_records
        ]
        return make_judgment_output(judged_records, judgments)
