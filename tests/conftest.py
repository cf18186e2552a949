"""What all tests share."""

import os
import shutil

import pytest
import torch
from hypothesis import settings
from playwright.sync_api import sync_playwright

# Prefect reads it when it is imported. At exit it would log into a stream that pytest has closed.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")

# Processes that test side by side (`pytest -n`) share the cores; whatever they start shares them as well.
if beside := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(beside))))

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=500)
settings.load_profile("dev")

# As many in every process and file: sums that threads share are added in another order, and other tokens are drawn.
torch.set_num_threads(1)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")  # no longer: while it lives, nothing else in this process can run an event loop
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"none of {', '.join(BROWSERS)} is installed; `apt-get install chromium`, or install Google Chrome")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Open a page that must need no network and report no error; `in_`: beside a page that is open, not afresh."""
    contexts, requests, faults = [], [], []

    def watch(page):
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))

    def open_page(path, in_=None, **options):
        context = in_.context if in_ else browser.new_context(offline=True, reduced_motion="reduce", **options)
        if in_ is None:
            contexts.append(context)
            context.set_default_timeout(5000)
            context.on("request", lambda request: requests.append(request.url))
            context.route(lambda url: not url.startswith(("file:", "blob:", "data:")), lambda route: route.abort())
        page = context.new_page()
        watch(page)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("file:", "blob:", "data:"))] == []
    assert faults == []


@pytest.fixture
def two_processors():
    """torch computes on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
