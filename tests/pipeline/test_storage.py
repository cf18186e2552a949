"""What is told where a kind of storage cannot be read here; runs in a real store are among the tests of the flows."""

from importlib.util import find_spec

import pytest

from pipeline import storage
from pipeline.errors import StorageError

NOT_HERE = {"gs": ("gcsfs", "pip install gcsfs"), "gcs": ("gcsfs", "pip install gcsfs"),
            "az": ("adlfs", "pip install adlfs"), "abfs": ("adlfs", "pip install adlfs"),
            "oss": ("ossfs", "install what it names")}  # fmt: skip


@pytest.mark.parametrize("scheme", NOT_HERE)
def test_a_scheme_without_its_package_names_that_package(scheme, tmp_path, monkeypatch):
    package, do = NOT_HERE[scheme]
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    monkeypatch.setenv(storage.MIRRORS, str(tmp_path))
    with pytest.raises(StorageError, match=package) as caught:
        storage.there(storage.place(f"{scheme}://bucket/runs/labels"))
    assert caught.value.where == f"{scheme}://bucket/runs/labels"
    assert caught.value.do.startswith(do)
