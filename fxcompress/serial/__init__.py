"""Modules and graphs as plain data, and back. Nothing here executes what it reads: names resolve in allow-lists."""

from fxcompress.serial.reading import build_module
from fxcompress.serial.tensors import Tensors
from fxcompress.serial.writing import module_data

__all__ = ["Tensors", "build_module", "module_data"]
