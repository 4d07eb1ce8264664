"""Whatever ends a write, its output is old, new or absent, nothing is left, and a full disk is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from conftest import TEXTS, write_gzipped, write_tiny_lm

RUN = Path(__file__).with_name("killed_run.py")
SCENARIOS = ("model", "npy", "parquet", "states", "conversion", "results", "bridge")
# A cache that cannot be written does without.
WARNS = {("states", "full"), ("states", "limit")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """All scenarios in one process, because its imports take seconds."""
    place = tmp_path_factory.mktemp("killed")
    pairs = [{"sentence1": a, "sentence2": b, "score": n} for n, (a, b) in enumerate(pairwise(TEXTS))]
    write_gzipped(place / "data" / "sts" / "Similar.jsonl.gz", pairs)
    lm = write_tiny_lm(place / "lm", "llama")
    done = subprocess.run(
        [sys.executable, RUN, place, lm, *SCENARIOS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["scenario"], line["how"]): line for line in found}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped", "full", "limit"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_write_cut_short(outcomes, scenario, how):
    outcome = outcomes[scenario, how]
    assert outcome["faults"] == []
    assert outcome["ended"] > (2 if how != "limit" else 0) or (scenario, how) in WARNS
