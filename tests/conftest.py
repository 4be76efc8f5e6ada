"""Shared fixtures. Networks and their graphs are built once; tests that change one copy it first."""

from __future__ import annotations

import pytest

from tests.helpers import Built, built


@pytest.fixture
def mlp() -> Built:
    return built("mlp")


@pytest.fixture
def conv_bn() -> Built:
    return built("conv_bn")


@pytest.fixture
def residual() -> Built:
    return built("residual")
