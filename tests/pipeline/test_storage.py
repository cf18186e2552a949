"""What is told where a kind of storage cannot be read here; runs in a real store are among the tests of the flows."""

from importlib.util import find_spec

import pytest

from pipeline import storage
from pipeline.errors import StorageError

ADVICE = {"gs": ("gcsfs", "pip install gcsfs"), "gcs": ("gcsfs", "pip install gcsfs"),
            "az": ("adlfs", "pip install adlfs"), "abfs": ("adlfs", "pip install adlfs"),
            "oss": ("ossfs", "install what it names")}  # fmt: skip


MISSING = [scheme for scheme, (package, _) in ADVICE.items() if find_spec(package) is None]
assert MISSING, "every package is installed: none of this can be seen"


@pytest.mark.parametrize("scheme", MISSING)
def test_a_scheme_without_its_package_names_that_package(scheme, tmp_path, monkeypatch):
    package, do = ADVICE[scheme]
    monkeypatch.setenv(storage.MIRRORS, str(tmp_path))
    with pytest.raises(StorageError, match=package) as caught:
        storage.there(storage.place(f"{scheme}://bucket/runs/labels"))
    assert caught.value.where == f"{scheme}://bucket/runs/labels"
    assert caught.value.do.startswith(do)
