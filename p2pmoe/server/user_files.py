"""Python files of the node's owner, which register experts. Knows the import system; nothing of experts.

A file is imported as it would be run: it finds its neighbours by `import neighbour`, and by relative imports where its
folder is a package. What it finds is its own: two files may have different neighbours of one name, and neither changes
what the name means to anybody else. Python's own modules, torch, numpy and p2pmoe are never taken from a neighbour.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader  # noqa: TID251 - the owner names the file
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from p2pmoe.errors import ConfigError

_PREFIX: Final = "p2pmoe_user_"
_NEVER: Final = frozenset({*sys.stdlib_module_names, "p2pmoe", "torch", "numpy"})


def import_file(path: Path) -> None:
    """Run a file of the owner's, once. Raises what it raises, or ConfigError when it is no Python file."""
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"experts.modules: there is no file {path}")
    folder, parts = path.parent, [path.stem.replace(".", "_")]
    while (folder / "__init__.py").is_file() and folder.parent != folder:
        parts.insert(0, folder.name)
        folder = folder.parent
    root = f"{_PREFIX}{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    name = ".".join([root, *parts])
    if name in sys.modules:
        return
    before = set(sys.modules)
    try:
        _open_root(root, folder)
        if len(parts) > 1:
            importlib.import_module(name.rpartition(".")[0])  # noqa: TID251 - the owner names it
        spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))  # noqa: TID251 - it
        assert spec is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        _Loader(name, str(path)).exec_module(module)
    except BaseException:
        for each in set(sys.modules) - before:  # half a module must not count as imported the next time
            if each.startswith(_PREFIX):
                del sys.modules[each]
        raise


def _open_root(root: str, folder: Path) -> None:
    """A package that stands for the folder; nothing of it is run."""
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if root not in sys.modules:
        package = ModuleType(root)
        package.__path__ = [str(folder)]
        sys.modules[root] = package


class _Finder(MetaPathFinder):
    """Finds the modules of owners' folders, and has their imports resolved beside them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if not fullname.startswith(_PREFIX) or path is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs a module whose import statements look beside it first."""

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
        statements = _import_from(tuple(dict.fromkeys((package, module.__name__.partition(".")[0]))))
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": statements}
        super().exec_module(module)


def _import_from(packages: tuple[str, ...]) -> Callable[..., ModuleType]:
    """What the import statement calls in the modules of one folder, in the place of `builtins.__import__`."""

    def import_(
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002 - as Python calls it
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        home = _home_of(name.partition(".")[0], packages) if level == 0 else None
        if home is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)  # noqa: TID251 - its own
        module = importlib.import_module(f"{home}.{name}")  # noqa: TID251 - its own
        if not fromlist:
            return sys.modules[f"{home}.{name.partition('.')[0]}"]
        if not hasattr(module, "__path__"):
            return module
        return builtins.__import__(f"{home}.{name}", globals, locals, fromlist)  # noqa: TID251 - its submodules

    return import_


def _home_of(top: str, packages: tuple[str, ...]) -> str | None:
    """In which of these packages a name that is imported without dots in front is found."""
    if top in _NEVER:
        return None
    for package in packages:
        if f"{package}.{top}" in sys.modules:
            return package
        spec = PathFinder.find_spec(f"{package}.{top}", sys.modules[package].__path__)
        if spec is not None and (spec.loader is not None or importlib.util.find_spec(top) is None):
            return package  # a folder without __init__.py only where nothing else has the name
    return None
