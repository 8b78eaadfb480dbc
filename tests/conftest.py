"""Settings of every test: one thread for torch, no time limit for Hypothesis."""

import os

from hypothesis import settings

# Before torch is imported anywhere, and inherited by the processes that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("fedraclora", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fedraclora")
