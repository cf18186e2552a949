"""Out to a person and back: what is clicked on the page in a browser is the ranking that training reads."""

import pytest
from playwright.sync_api import expect

from pipeline.contracts import PROMPTS, ROLLOUTS
from stages.ask import Settings as AskSettings
from stages.ask import ask
from stages.rank import Settings as RankSettings
from stages.rank import rank

TEXTS = {"sum": ["3", "4", "5", "1+2=3;3"], "poem": ["roses", "</script><b>violets</b>", "=1+1"], "two": ["yes", "no"]}


@pytest.fixture(scope="module")
def questions(by_hand, room):
    prompts = by_hand(
        PROMPTS,
        [
            {"prompt_id": name, "messages": [{"role": "user", "content": f"{name}?"}], "answer": None, "grader": "none",
             "source": "hand"}
            for name in TEXTS
        ],
    )  # fmt: skip
    rollouts = by_hand(
        ROLLOUTS,
        [
            {"prompt_id": name, "sample": sample, "prompt_tokens": [1], "response_tokens": [2], "response": text,
             "sampler_logprobs": None, "finish": "stop", "seed": 0}
            for name, texts in TEXTS.items()
            for sample, text in enumerate(texts)
        ],
    )  # fmt: skip
    settings = AskSettings.of(None, {"annotators": ["anna", "ben"], "overlap": 2})
    return ask.run(room / "asked", settings, rollouts=rollouts.path, prompts=prompts.path)


def answered(opened, questions, name, folder, click):
    """One person's sitting: every question ranked by `click`, then saved."""
    page = opened(questions.path / "annotate.html")
    page.click(f"text={name}")
    for question in click:
        expect(page.locator("#cards .badge")).to_have_count(len(question))
        for key in question:
            page.keyboard.press(str(key))
        page.keyboard.press("Enter")
    with page.expect_download() as waited:
        page.click("#save")
    waited.value.save_as(folder / waited.value.suggested_filename)
    return folder / waited.value.suggested_filename


def test_what_two_people_click_is_what_training_reads(opened, questions, tmp_path, sound):
    shown = questions.table().to_pylist()
    dense = {(2, 1, 2, 4): [1, 0, 1, 2], (1, 2, 3): [0, 1, 2], (2, 1): [1, 0], (1, 1, 2, 1): [0, 0, 1, 0]}
    by_size = {"anna": {4: (2, 1, 2, 4), 3: (1, 2, 3), 2: (2, 1)}, "ben": {4: (1, 1, 2, 1), 3: (1, 2, 3), 2: (2, 1)}}
    clicked = {name: [sizes[len(q["responses"])] for q in shown] for name, sizes in by_size.items()}
    files = [answered(opened, questions, name, tmp_path, keys) for name, keys in clicked.items()]
    assert [file.name for file in files] == ["annotations-anna.jsonl", "annotations-ben.jsonl"]
    made = rank.run(tmp_path / "out", RankSettings.of(None, {}), questions=questions.path, annotations=files)
    sound(made)
    read = {(row["prompt_id"], row["annotator"]): row for row in made.table().to_pylist()}
    assert len(read) == 6
    for name, keys in clicked.items():
        for question, pressed in zip(shown, keys, strict=True):
            row = read[question["prompt_id"], name]
            assert dict(zip(row["responses"], row["ranks"], strict=True)) == dict(
                zip(question["responses"], dense[pressed], strict=True)
            )
    assert made.stats["agreement/questions"] == 3
