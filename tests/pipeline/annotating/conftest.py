"""Questions to ask."""

import pytest


@pytest.fixture
def question():
    """A row of the questions contract: a name and its responses."""

    def write(name, *texts, annotators=(), messages=None):
        return {
            "question_id": f"q-{name}", "prompt_id": name, "responses": list(texts), "annotators": list(annotators),
            "messages": messages or [{"role": "user", "content": f"{name}?"}], "source": "hand",
            "response_ids": [f"{name}/{number}" for number in range(len(texts))],
        }  # fmt: skip

    return write
