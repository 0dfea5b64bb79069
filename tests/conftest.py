from functools import partial

import pytest

from cuda_placement.build import CannotBuild, build_stand_ins
from cuda_placement.probe import placement


@pytest.fixture(scope="session")
def cuda_placement(tmp_path_factory):
    """`placement` on stand-in CUDA libraries: cuda_placement(model_path, session_entries, dims=None)."""
    try:
        return partial(placement, env=build_stand_ins(tmp_path_factory.mktemp("cuda_stand_ins")))
    except CannotBuild as reason:
        pytest.skip(str(reason))
