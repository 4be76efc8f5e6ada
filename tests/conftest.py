"""Shared fixtures. Networks and their graphs are built once; tests that change one copy it first."""

from __future__ import annotations

import os

import pytest
import torch

from tests.helpers import Built, built


def pytest_configure(config: pytest.Config) -> None:
    """Workers of `pytest -n` share the cores, and so do the processes that their tests start."""
    if hasattr(config, "workerinput"):
        threads = max(1, torch.get_num_threads() // config.workerinput["workercount"])
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@pytest.fixture
def mlp() -> Built:
    return built("mlp")


@pytest.fixture
def conv_bn() -> Built:
    return built("conv_bn")


@pytest.fixture
def residual() -> Built:
    return built("residual")
