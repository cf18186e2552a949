"""The pipeline on a GPU: `arithmetic` with a model of 20 to 100 million parameters made from its config, in bfloat16.

    .venv/bin/python tests/benchmarks/gpu.py                a GPU of DEVICES
    .venv/bin/python tests/benchmarks/gpu.py --device core --layers 2 --width 128 --responses 128    tried without one

A whole run of `rlhf run`: SFT, then iterations. Of each iteration but the first: tokens/s of the rollout and of the
update, and their share of the device's peak by 2 P and 6 P operations a token; how far sampler and trainer are apart
(|difference| of log-probability, mean over tokens); the most memory that was in use on the device, polled.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from measuring import ROOT, WORK, rlhf, store

sys.path.insert(0, str(ROOT))

from pipeline.catalog import catalog
from pipeline.estimate import DEVICES, Shape
from pipeline.inspecting.curves import by_iteration

PAUSE = 0.2
"""Seconds between two looks at the memory in use."""
SEEN = {
    "sampled": ("rollouts", "speed/tokens_per_second"), "updated": ("policy", "speed/tokens_per_second"),
    "mismatch": ("scores", "kl/sampler_abs"), "accuracy": ("labels", "accuracy/mean"),
}  # fmt: skip
"""What is told -> the kind of artifact that measured it, and the metric."""


def nvidia(field: str) -> str:
    """What the driver says of the first GPU. Ends with a sentence where there is none."""
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("no GPU on this machine (no nvidia-smi); `--device core` tries it without one")
    words = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def in_use(device: str) -> float:
    """Gigabytes of the device's memory in use now."""
    return psutil.virtual_memory().used / 1e9 if device == "core" else float(nvidia("memory.used")) * 2**20 / 1e9


@contextmanager
def watched(device: str) -> Iterator[list[float]]:
    """Gigabytes in use, looked at again and again; the first look is before anything runs."""
    seen, done = [in_use(device)], threading.Event()

    def look() -> None:
        while not done.wait(PAUSE):
            seen.append(in_use(device))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        done.set()
        looking.join()


def changes(asked: argparse.Namespace) -> list[str]:
    """What is other than in `arithmetic`: the model, its arithmetic, sizes."""
    return [
        f"models.new.layers={asked.layers}", f"models.new.width={asked.width}", f"models.new.heads={asked.width // 64}",
        f"models.new.kv_heads={max(1, asked.width // 128)}", "models.new.ffn=3", f"scale.iterations={asked.iterations}",
        f"scale.responses={asked.responses}", "scale.learning_rate=5e-5", "sft.learning_rate=5e-4",
        "resources.dtype=bfloat16", "resources.compute_dtype=bfloat16", "resources.micro_batch_tokens=65536",
    ]  # fmt: skip


def main() -> None:
    """Run, read what the run measured, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100", help="whose peak shares are of")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--responses", type=int, default=4096, help="an iteration's")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--recipe", default="vc_ppo")
    asked = parser.parse_args()
    name = "core" if asked.device == "core" else nvidia("name")
    folder = WORK / "gpu"
    shutil.rmtree(folder, ignore_errors=True)
    words = [word for change in changes(asked) for word in ("--set", change)]
    with watched(asked.device) as memory:
        rlhf("run", "arithmetic", "--recipe", asked.recipe, "--name", "gpu", "--root", folder, *words)
    found = told(folder / "gpu", asked.device)
    found["memory"] = max(memory) - memory[0]
    print(f"{name}, {found['parameters'] / 1e6:.0f} million parameters, bfloat16")
    for what in ("sampled", "updated"):
        print(f"{what:10} {found[what]:12,.0f} tokens/s  {found[f'{what}_share']:7.2%} of the peak")
    print(f"{'memory':10} {found['memory']:12.1f} GB")
    print(f"{'mismatch':10} {found['mismatch']:12.5f} nat a token, sampler against trainer")
    print(f"{'accuracy':10} {found['accuracy']:12.3f} in the last iteration")
    store("gpu" if asked.device != "core" else "gpu-core", {"device": name, "asked": vars(asked), **found})


def told(run: Path, device: str) -> dict[str, float]:
    """The middle of what the iterations but the first measured; of accuracy the last."""
    numbers = by_iteration(catalog([run])).filter(phase="loop").sort("iteration")
    series = {what: numbers.filter(kind=kind, name=metric)["value"].to_list() for what, (kind, metric) in SEEN.items()}
    found = {what: statistics.median(values[1:] or values) for what, values in series.items()}
    found["accuracy"] = series["accuracy"][-1]
    shape = Shape.of(json.loads((run / "0000" / "policy" / "config.json").read_bytes()))
    found["parameters"] = shape.parameters
    peak = DEVICES[device].flops
    return found | {
        "sampled_share": 2 * shape.parameters * found["sampled"] / peak,
        "updated_share": 6 * shape.parameters * found["updated"] / peak,
    }  # fmt: skip


if __name__ == "__main__":
    main()
