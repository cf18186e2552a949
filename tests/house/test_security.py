"""What comes from outside is data: nothing is unpickled, evaluated or run, and no name leads out of its directory."""

import ast
import json
from pathlib import Path

import pytest

from pipeline.artifacts import Artifact, Manifest
from pipeline.errors import ArtifactError, ExperimentError, PipelineError
from pipeline.experiment import Experiment
from pipeline.grading import judge
from pipeline.settings import plain_name

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("pipeline", "stages", "flows") for path in sorted((ROOT / room).rglob("*.py"))]
UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "torch.load", "numpy.load", "np.load", "os.system", "yaml.load", "__import__"}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_evaluates_or_trusts_remote_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not UNPICKLING & {module.partition(".")[0] for module in modules}, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert name_of(node.func) not in CALLS, f"{path}:{node.lineno} calls {name_of(node.func)}"
            for keyword in node.keywords:
                trusted = keyword.arg in ("trust_remote_code", "shell") and ast.unparse(keyword.value) != "False"
                assert not trusted, f"{path}:{node.lineno} {keyword.arg}={ast.unparse(keyword.value)}"


def test_every_model_is_loaded_with_remote_code_off():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Call) and name_of(node.func).endswith(".from_pretrained")
            if named and not name_of(node.func).startswith("GenerationConfig"):  # reads JSON, knows no code
                assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", ".", "..", ".hidden", "", "-rf", "a\\b", "a\nb", "a\0b", "~"])
def test_a_name_cannot_leave_its_directory(name, tmp_path):
    with pytest.raises(ValueError, match="no plain name"):
        plain_name(name)
    file = tmp_path / "x.toml"
    file.write_text(
        'recipe = "grpo"\n[models]\npolicy = "p"\n[sft]\nenabled = false\n[data]\nprompts = {source = "arithmetic"}\n'
        "[scale]\niterations = 1\ngroups = 4\nprompt_tokens = 8\nresponse_tokens = 8\nlearning_rate = 1e-3\n"
    )
    for place in ("name", "base") if name else ("base",):  # a run without a name is called as its file is
        with pytest.raises(ExperimentError, match="no plain name"):
            Experiment.load(file, [f"{place}={json.dumps(name)}"])


def test_a_manifest_cannot_name_files_outside_its_artifact(tmp_path):
    for name in ("../../etc/passwd", "/etc/passwd", "a/../../b"):
        manifest = {
            "kind": "prompts", "contract": 1, "stage": "s", "version": 1, "fingerprint": "f", "digest": "d",
            "settings": {}, "inputs": {}, "files": {name: {"bytes": 1, "blake2b": "00"}},
        }  # fmt: skip
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match="leads out of the artifact"):
            Manifest.read(tmp_path)
        with pytest.raises(ArtifactError):
            Artifact.open(tmp_path)


@pytest.mark.parametrize("grader", ["math", "exact"])
def test_graders_evaluate_nothing_that_a_model_writes(grader, tmp_path):
    bait = tmp_path / "run"
    code = f"__import__('os').system('touch {bait}')"
    texts = [
        rf"\boxed{{{code}}}", f"The answer is {code}", f"#### {code}", rf"${code}$", f"\\boxed{{exec(\"{code}\")}}",
        rf"\boxed{{\input|\"touch {bait}\"}}", f"{{{{{code}}}}}",
    ]  # fmt: skip
    judged = judge(grader, texts, ["4"] * len(texts), workers=1)
    judge(grader, ["4"] * len(texts), texts, workers=1)
    assert len(judged) == len(texts) and not any(judgement.correct for judgement in judged)
    assert not bait.exists()


def test_a_checkpoint_that_brings_its_own_code_is_refused_and_its_code_not_run(tmp_path):
    from pipeline.models import checkpoint

    bait = tmp_path / "run"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(bait)!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Evil"], "model_type": "evil", "vocab_size": 4, "hidden_size": 4,
                "num_hidden_layers": 1, "max_position_embeddings": 4,
                "auto_map": {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
            }
        )
    )  # fmt: skip
    with pytest.raises(PipelineError):
        checkpoint.inspect(tmp_path)
    with pytest.raises(PipelineError):
        checkpoint.load_policy(tmp_path, "float32")
    assert not bait.exists()
