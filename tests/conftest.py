"""What every file of tests shares."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_file():
    """A process of the whole suite would hold 6 to 8 GB of them."""
    yield
    jax.clear_caches()
