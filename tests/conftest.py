"""What all tests share."""

import os

from hypothesis import settings

# Prefect reads it when it is imported. At exit it would log into a stream that pytest has closed.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=500)
settings.load_profile("dev")
