"""The pipeline on a GPU: `arithmetic` with a model of 20 to 100 million parameters made from its config, in bfloat16.

    .venv/bin/python tests/benchmarks/gpu.py                the first GPU, if it is of DEVICES
    .venv/bin/python tests/benchmarks/gpu.py --device core --layers 2 --width 128 --responses 128    tried without one

A whole run of `rlhf run`: SFT, then iterations. The middle of the iterations but the first: tokens/s of the rollout and
of the update, and their share of the device's peak by 2 P and 6 P operations a token; how far sampler and trainer are
apart (|difference| of log-probability, mean over tokens); what is in use on the device while the engine is awake, which
is mostly what it reserves, and while it sleeps. Then the last update once more, in a process of its own: most memory of
its tensors at once. Without a GPU that is the process's own most, and engines do not sleep.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from measuring import ROOT, WORK, rlhf, side, store

sys.path.insert(0, str(ROOT))

from pipeline.artifacts import Artifact
from pipeline.catalog import catalog
from pipeline.estimate import DEVICES, Shape
from pipeline.inspecting.curves import by_iteration

SEEN = {
    "sampled": ("rollouts", "speed/tokens_per_second"), "updated": ("policy", "speed/tokens_per_second"),
    "mismatch": ("scores", "kl/sampler_abs"), "accuracy": ("labels", "accuracy/mean"),
}  # fmt: skip
"""What is told -> the kind of artifact that measured it, and the metric."""
ASLEEP = {"awake": ("rollouts", "memory/engine_awake"), "asleep": ("rollouts", "memory/engine_asleep")}
"""What is told where there is an accelerator."""


def driver() -> str:
    """What the driver calls the first GPU. Ends with a sentence where there is none."""
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("no GPU on this machine (no nvidia-smi); `--device core` tries it without one")
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def kind_of(name: str) -> str:
    """Which of DEVICES a GPU is, by its name. Ends with a sentence where it is none."""
    kinds = [kind for kind in DEVICES if kind != "core" and kind in name.lower()]
    if not kinds:
        raise SystemExit(f"{name}: its peak is not known; add it to DEVICES (pipeline/estimate.py), or say --device")
    return kinds[0]


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
    parser.add_argument("--device", choices=sorted(DEVICES), help="whose peak shares are of, if not the first GPU's")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--responses", type=int, default=4096, help="an iteration's")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--recipe", default="vc_ppo")
    parser.add_argument("--set", action="append", default=[], help="a further change, as of `rlhf run`")
    parser.add_argument("--side", choices=["update"], help="what this process is for, started by the benchmark")
    parser.add_argument("--plan", type=Path, help="of that process")
    asked = parser.parse_args()
    if asked.side:
        update_again(asked.plan)
        return
    name = "core" if asked.device == "core" else driver()
    device, folder = asked.device or kind_of(name), WORK / "gpu"
    shutil.rmtree(folder, ignore_errors=True)
    words = [word for change in [*changes(asked), *asked.set] for word in ("--set", change)]
    rlhf("run", "arithmetic", "--recipe", asked.recipe, "--name", "gpu", "--root", folder, *words)
    found = told(folder / "gpu", device)
    plan = folder / "plan.json"
    last = folder / "gpu" / f"{asked.iterations - 1:04d}" / "policy"
    plan.write_text(json.dumps({"policy": str(last), "out": str(folder / "again")}), encoding="utf-8")
    again = side(Path(sys.executable), __file__, "update", plan)
    found["trainer"] = again["allocated"] or again["gigabytes"]
    print(f"{name}, {found['parameters'] / 1e6:.0f} million parameters")
    for what in ("sampled", "updated"):
        print(f"{what:10} {found[what]:12,.0f} tokens/s  {found[f'{what}_share']:7.2%} of the peak")
    print(f"{'trainer':10} {found['trainer']:12.1f} GB at most")
    for what in (what for what in ASLEEP if what in found):
        print(f"{'engine':10} {found[what]:12.1f} GB in use on the device while it is {what}")
    print(f"{'mismatch':10} {found['mismatch']:12.5f} nat a token, sampler against trainer")
    print(f"{'accuracy':10} {found['accuracy']:12.3f} in the last iteration")
    sizes = {what: getattr(asked, what) for what in ("layers", "width", "responses", "iterations", "recipe", "set")}
    store("gpu" if device != "core" else "gpu-core", {"device": name, "asked": sizes, **found})


def update_again(plan: Path) -> None:
    """Make an update anew, here, and tell how many gigabytes its tensors had at most; nothing where there is no GPU."""
    import torch

    from stages.update import update

    asked = json.loads(plan.read_bytes())
    made = Artifact.open(Path(asked["policy"])).manifest
    inputs = {name: [record.place for record in records] for name, records in made.inputs.items()}
    update.run(Path(asked["out"]), update.settings_type.model_validate(made.settings), **inputs)
    allocated = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    plan.with_name("update.json").write_text(json.dumps({"allocated": allocated}), encoding="utf-8")


def told(run: Path, device: str) -> dict[str, float]:
    """The middle of what the iterations but the first measured; of accuracy the last."""
    numbers = by_iteration(catalog([run])).filter(phase="loop").sort("iteration")
    wanted = (SEEN | ASLEEP).items()
    series = {what: numbers.filter(kind=kind, name=metric)["value"].to_list() for what, (kind, metric) in wanted}
    found = {what: statistics.median(values[1:] or values) for what, values in series.items() if values}
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
