"""Label and advantage start without torch: what they import of the room must not load it."""

import subprocess
import sys

import pytest

TORCH_FREE = ("shelf", "recipe", "labels", "filters", "shaping", "advantages", "normalizers", "importance")
HEAVY = ("torch", "transformers", "pyarrow", "vllm", "prefect")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_numpy_pieces_load_nothing_heavy(module):
    code = f"import sys, pipeline.algorithms.{module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_room_itself_imports_nothing():
    code = "import sys, pipeline.algorithms; print([name for name in ('numpy', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
