"""Ray as the tests need it: nodes of one machine, without a token in the home folder."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Workers are as quick as the tests that wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")
