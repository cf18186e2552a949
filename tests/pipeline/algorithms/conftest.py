"""The room's shape annotations are executed in its tests."""

from jaxtyping import install_import_hook

install_import_hook("pipeline.algorithms", "beartype.beartype")
