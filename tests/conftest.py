import gc

import pytest

pytest_plugins = ["helpers.times", "helpers.together"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """What shares the work out among others runs no test, and need not import what they test: seconds for all."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("helpers.fixtures")


def pytest_collection_finish():
    """What was imported stays, and is not looked through for garbage again and again: a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
