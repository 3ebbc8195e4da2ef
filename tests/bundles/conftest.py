"""Small bundles, as the tests of inference have them."""

from tests.infer.conftest import _one_thread, bundle, bundle_folder, make

__all__ = ["_one_thread", "bundle", "bundle_folder", "make"]
