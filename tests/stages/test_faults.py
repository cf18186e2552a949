"""What can befall files, each by really doing it: the error says what, where and what to do; the next try goes on.

Disks of their own are tmpfs mounts in a mount namespace (`unshare`), which ends with the process that made it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, PipelineError, StorageError
from pipeline.storage import SCRATCH
from pipeline.text import Chat
from stages.label import Settings as LabelSettings
from stages.label import label
from stages.rollout import rollout
from stages.score import Settings as ScoreSettings
from stages.score import score

ON_A_SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path
from pipeline.errors import PipelineError
from stages.ingest import Settings, ingest

disk, files = Path(sys.argv[1]), [Path(sys.argv[2])]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=%s", "tmpfs", str(disk)], check=True)
settings = Settings.of(None, {"kind": "documents", "source": "files"})
told = []

def attempt(out=disk / "runs" / "documents"):
    try:
        made = ingest.run(out, settings, files=files)
        told.append({"rows": made.stats["rows"], "faults": made.faults()})
    except PipelineError as error:
        told.append({"kind": type(error).__name__, "what": error.what, "where": error.where, "do": error.do,
                     "there": sorted(p.name for p in (disk / "runs").glob("[!.]*"))})

%s
json.dump(told, sys.stdout)
"""


def on_a_small_disk(tmp_path, size: str, story: str):
    """Run a story in a process with a disk of its own, and return what its attempts came to."""
    disk, texts = tmp_path / "disk", tmp_path / "texts.jsonl"
    disk.mkdir()
    texts.write_text("".join(json.dumps({"text": f"{n} " + "word " * 40}) + "\n" for n in range(2000)))
    script = ON_A_SMALL_DISK % (size, story)
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", script, str(disk), str(texts)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_full_disk_is_named_and_the_next_try_goes_on_when_there_is_room(tmp_path):
    story = """
ballast = disk / "ballast"
ballast.write_bytes(bytes(2**20 - 24 * 2**10))
attempt()
ballast.unlink()
attempt()
"""
    full, room = on_a_small_disk(tmp_path, "1m", story)
    assert full["kind"] == "StorageError" and "the disk is full, 0 MiB free" in full["what"]
    assert full["where"].endswith("runs/documents") and "rlhf prune" in full["do"] and full["there"] == []
    assert room == {"rows": 2000, "faults": []}


def test_a_disk_that_cannot_be_written_is_named_and_a_writable_one_goes_on(tmp_path):
    story = """
(disk / "runs").mkdir()
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
attempt()
subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
attempt()
"""
    locked, open_ = on_a_small_disk(tmp_path, "4m", story)
    assert locked["kind"] == "StorageError" and "Read-only file system" in locked["what"] and locked["there"] == []
    assert "make it writable" in locked["do"]
    assert open_ == {"rows": 2000, "faults": []}


@pytest.fixture
def copies(tmp_path, prompts, policy, rollouts):
    """Copies of a prompts artifact, a policy and its rollouts, to be harmed."""

    def copied(one: Artifact, name: str) -> Artifact:
        shutil.copytree(one.path, tmp_path / name)
        return Artifact.open(tmp_path / name)

    return copied(prompts, "prompts"), copied(policy, "policy"), copied(rollouts, "rollouts")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"), [(truncated, "bytes, made with"), (flipped, "other bytes"), (Path.unlink, "gone")]
)
def test_a_harmed_part_is_refused_before_it_is_read_and_remade_bytes_are_taken(tmp_path, copies, harm, said):
    prompts, _, rollouts = copies
    part = rollouts.part_paths()[1]
    good = part.read_bytes()
    harm(part)
    settings = LabelSettings.of(None, {"label": {"kind": "verifier"}})
    with pytest.raises(ArtifactError, match=f"{part.name}: .*{said}") as caught:
        label.run(tmp_path / "labels", settings, rollouts=rollouts.path, prompts=prompts.path)
    assert caught.value.where == str(rollouts.path) and "rlhf redo" in caught.value.do
    assert not (tmp_path / "labels").exists() and not list(tmp_path.glob(f"{SCRATCH}*"))
    part.write_bytes(good)
    assert label.run(tmp_path / "labels", settings, rollouts=rollouts.path, prompts=prompts.path).stats["rows"] > 0


def test_a_truncated_checkpoint_is_refused_whether_it_is_an_artifact_or_from_elsewhere(tmp_path, copies, sampling):
    prompts, policy, _ = copies
    truncated(policy.path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: .*made with"):
        rollout.run(tmp_path / "r", sampling(), prompts=prompts.path, policy=policy.path)
    (policy.path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        rollout.run(tmp_path / "r", sampling(), prompts=prompts.path, policy=policy.path)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, copies, sampling):
    prompts, policy, _ = copies
    weights = load_file(policy.path / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, policy.path / "model.safetensors", {"format": "pt"})
    (policy.path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=f"{name} has 1 of .* not finite"):
        rollout.run(tmp_path / "r", sampling(), prompts=prompts.path, policy=policy.path)


def test_the_tokenizer_of_another_model_is_refused(tmp_path, copies, sampling):
    """Rollouts were made with one tokenizer, and the model that is to read them has another."""
    _, policy, rollouts = copies
    tokenizer = json.loads((policy.path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (policy.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (policy.path / "manifest.json").unlink()
    settings = ScoreSettings(needs=("old_logprobs",), temperature=1.0)
    with pytest.raises(PipelineError, match="tokenizer"):
        score.run(tmp_path / "s", settings, rollouts=[rollouts.path], policy=policy.path)
    assert Chat(policy.path)


def test_what_a_killed_try_left_of_a_checkpoint_is_not_taken_for_one(tmp_path, policy, copies, sft_settings, world):
    """A file that half of `save` wrote, and one that has no business there."""
    from stages.sft import sft

    demonstrations = Path(policy.manifest.inputs["demonstrations"][0].path)
    scratch = tmp_path / f"{SCRATCH}again-{policy.manifest.fingerprint[:8]}"
    scratch.mkdir()
    (scratch / "model.safetensors").write_bytes((policy.path / "model.safetensors").read_bytes()[:1000])
    (scratch / "model-00002-of-00002.safetensors").write_bytes(b"left over")
    again = sft.run(tmp_path / "again", sft_settings(), demonstrations=demonstrations)
    assert again.manifest.digest == policy.manifest.digest and again.faults() == []


def test_a_storage_error_in_the_words_of_a_library_is_still_one(tmp_path):
    """safetensors is Rust: its errors have no errno."""
    script = """
from pathlib import Path
import torch
from safetensors.torch import save_file
from pipeline.disk import of_storage, storage_error
import sys, subprocess
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
try:
    save_file({"x": torch.zeros(100_000)}, disk / "x.safetensors")
except Exception as error:
    assert of_storage(error), error
    print(storage_error(error, disk / "x"))
"""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "the disk is full" in done.stdout
    assert issubclass(StorageError, PipelineError)
