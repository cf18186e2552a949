"""The annotators' page: one HTML file that holds the questions, needs no network and saves what people rank.

The template `page.html` is the whole program. The questions stand in it as JSON, in a form that no text can break out
of. A policy in the page itself lets nothing run but its own script, and nothing go out.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline import pages
from pipeline.annotating.sheets import Question, people, responses

PAGE_FILE = "annotate.html"


def write_page(path: Path, questions: Sequence[Question], overlap: int) -> None:
    """Write the page for these questions; `overlap` is how many people rank each."""
    path.write_text(page(questions, overlap), encoding="utf-8", newline="\n")


def page(questions: Sequence[Question], overlap: int) -> str:
    """The page as text. Its `digest` names the questions: what people rank is kept in their browser under it."""
    about = {
        "overlap": overlap, "annotators": people(questions),
        "questions": [
            {
                "question_id": question["question_id"], "annotators": question["annotators"],
                "messages": [{"role": turn["role"], "content": turn["content"]} for turn in question["messages"]],
                "responses": responses(question),
            }
            for question in questions
        ],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return pages.page(__package__, "page.html", {"digest": digest, **about})
