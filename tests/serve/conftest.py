"""One small base with adapters on disk for all tests here: what is compiled for it is compiled once."""

import pytest

from tests.serve.parts import Served, made


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """(base, folder of adapters)."""
    return made(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def served(place):
    served = Served(*place)
    yield served
    served.close()
