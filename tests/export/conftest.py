"""The bundled model exported once for all tests of a run, whatever the number of processes."""

from pathlib import Path

import pytest

from .exported import export_once


@pytest.fixture(scope="session")
def nano_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts of nano in fp32. Not to be changed: copy it."""
    return export_once(tmp_path_factory, "float32")


@pytest.fixture(scope="session")
def nano_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts of nano in int8, calibrated on three pictures."""
    return export_once(tmp_path_factory, "int8")
