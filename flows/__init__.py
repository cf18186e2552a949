"""Orchestration: when stages run, on what, and how often. The only room that knows Prefect."""

import os

# Prefect and the Hub read these when they are imported. What the user has set stays.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
