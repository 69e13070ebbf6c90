"""Tiny models of each family, built once for all tests of a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scorers import contrastive_models, families


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, which no test may change."""

    @functools.cache
    def built(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        if family in families.FAMILIES:
            return families.save(family, folder)
        return contrastive_models.FAMILIES[family](folder)

    return built
