"""The architectures, one family in a file. To add a model, add a file here.

Every module without a leading underscore is imported, and registers its factories.
"""

import importlib
import pkgutil

from models._dropout import rows_of_batch
from models._registry import (
    SHORTCUT,
    ModelError,
    create_model,
    identify,
    list_models,
    model_arguments,
    register,
)

__all__ = [
    "SHORTCUT",
    "ModelError",
    "create_model",
    "identify",
    "list_models",
    "model_arguments",
    "register",
    "rows_of_batch",
]

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
