import pytest


@pytest.fixture(autouse=True)
def _pipelines(one_core: None, no_thread_left: None) -> None:
    """Every test here runs pipelines."""
