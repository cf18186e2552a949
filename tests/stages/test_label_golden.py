"""The accuracies that `label` reports, against reference cases."""

import json
from pathlib import Path

import pytest

from pipeline.contracts import PROMPTS, ROLLOUTS
from stages.label import Settings, label

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["accuracy"], ids=lambda case: case["name"])
def test_accuracy_golden(case, by_hand, tmp_path):
    groups = {f"p{place}": right for place, right in enumerate(case["inputs"]["correct"])}
    asked = [
        {"prompt_id": name, "messages": [{"role": "user", "content": name}], "answer": "1", "grader": "exact",
         "source": "hand"}
        for name in groups
    ]  # fmt: skip
    answered = [
        {"prompt_id": name, "sample": sample, "prompt_tokens": [1], "response_tokens": [2], "response": str(correct),
         "sampler_logprobs": [-1.0], "finish": "stop", "seed": 0}
        for name, right in groups.items()
        for sample, correct in enumerate(right)
    ]  # fmt: skip
    made = label.run(
        tmp_path / "labels", Settings.of(None, {"label": {"kind": "verifier"}}),
        rollouts=by_hand(ROLLOUTS, answered).path, prompts=by_hand(PROMPTS, asked).path,
    )  # fmt: skip
    for name, value in case["outputs"].items():
        assert made.stats[name] == pytest.approx(value, rel=1e-6), name
