import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_import_contracts_hold():
    done = run("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_stages_that_need_no_model_start_without_torch():
    """The contract reads import statements; this executes them."""
    heavy = "{'torch', 'transformers', 'vllm', 'prefect'}"
    names = ", ".join(f"stages.{name}" for name in ("label", "ask", "rank", "advantage", "ingest"))
    done = run(f"import sys, {names}; print({heavy} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
