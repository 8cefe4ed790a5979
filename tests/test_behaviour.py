"""Draws, losses, gradients, KL, ranks and predictions are those that were written down."""

import json
import os

import pytest
import torch

from behaviour import FILE, cases, record_of

WRITTEN = json.loads(FILE.read_text("utf-8"))
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.05, "method": 2e-3}
"""Relative to the largest number of a list: processors round differently, and training amplifies
that. On one machine the difference is 0 (`BARA_EXACT=1`)."""
FLOOR = 1e-6
"""Absolute: an epistemic uncertainty is the difference of two entropies near 1, in float32."""


def test_every_record_is_compared():
    assert sorted(WRITTEN) == sorted(cases())


@pytest.mark.parametrize("case", cases())
def test_numbers_are_as_written(case):
    kind = "method" if case.startswith("method") else case.split(" ")[2]
    exact = os.environ.get("BARA_EXACT") == "1"
    record = record_of(case)
    assert list(record) == list(WRITTEN[case])
    for what, values in record.items():
        before = torch.tensor(WRITTEN[case][what], dtype=torch.float64)
        now = torch.tensor(values, dtype=torch.float64)
        assert now.shape == before.shape, what
        assert now.isfinite().all(), what
        if exact:
            assert torch.equal(now, before), what
        else:
            largest = float(before.abs().max()) if len(before) else 0.0
            torch.testing.assert_close(
                now, before, rtol=0, atol=TOLERANCE[kind] * largest + FLOOR, msg=what
            )
