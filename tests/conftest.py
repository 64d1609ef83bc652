"""Shared set-up. A server or cluster that the user's shell points at is never touched by a test."""

import os

for name in ("PREFECT_API_URL", "PREFECT_API_KEY", "RAY_ADDRESS"):
    os.environ.pop(name, None)
os.environ["DO_NOT_TRACK"] = "1"
