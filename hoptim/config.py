"""Hydra: the search-path plugin by which any project's config finds hoptim's groups, ``- hoptim/solver: neumann``.

A wheel carries this file a second time, as ``hydra_plugins/hoptim_config.py``, which is where Hydra looks. Every Hydra
application of the environment therefore imports it: it imports nothing heavy, torch and hoptim itself included.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


def conf_dir() -> Path:
    """The folder of hoptim's configs: the copy inside the package, which a wheel has, else ``conf/`` of the checkout."""
    spec = find_spec("hoptim")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("hoptim is not installed, though its Hydra plugin is: pip install hoptim again")
    package = Path(spec.origin).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


class HoptimSearchPath(SearchPathPlugin):
    """Adds hoptim's ``conf/`` behind the application's own search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder, so that the application's own files of the same name win."""
        search_path.append(provider="hoptim", path=f"file://{conf_dir()}")
