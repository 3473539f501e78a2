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
    """The folder of hoptim's configs: ``conf/`` of the checkout where there is one, else the copy inside the package."""
    spec = find_spec("hoptim")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("hoptim is not installed, though its Hydra plugin is: pip install hoptim again")
    package = Path(spec.origin).parent
    checkout = package.parent
    return checkout / "conf" if (checkout / "pyproject.toml").is_file() else package / "conf"


class HoptimSearchPath(SearchPathPlugin):
    """Adds hoptim's ``conf/`` behind the application's own search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder, so that the application's own files of the same name win."""
        search_path.append(provider="hoptim", path=f"file://{conf_dir()}")
