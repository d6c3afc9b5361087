"""Files inside installed Python packages, written `package:NAME/FILE`: models and texts that a package manager brought."""

import importlib.util
import os
from pathlib import Path

from minitron.errors import refuse

PREFIX = "package:"


def resolve_package(path: str, setting: str) -> Path:
    """The file or folder that `package:NAME/FILE` names, found without importing the package.

    Raises RequestError, naming `setting`, where the form is wrong, the package is not installed or it holds no such file.
    """
    name, _, inner = path.removeprefix(PREFIX).partition("/")
    # a dotted name would import its parent, and importing runs the package's code
    if not path.startswith(PREFIX) or not name.isidentifier() or not inner:
        raise refuse(setting, path, "package:NAME/FILE is needed, NAME being the name that Python imports")
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that was put in place by hand has no spec
        spec = None
    if spec is None or spec.submodule_search_locations is None:
        raise refuse(setting, path, f"no Python package {name} is installed")
    for location in spec.submodule_search_locations:
        if os.path.exists(found := Path(location, inner)):
            return found
    raise refuse(setting, path, f"the package {name} holds no {inner}")
