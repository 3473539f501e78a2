"""The search-path plugin by which any Hydra application finds hoptim's config groups. See conf/README.md.

An installation has a copy of it as ``hydra_plugins/hoptim_config.py``, where Hydra looks for plugins; a wheel has it only
there. It imports neither torch nor hoptim, since every Hydra application in the environment imports it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class HoptimSearchPath(SearchPathPlugin):
    """Adds the folder of hoptim's groups to the end of the application's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder, so that the application's own files of the same name win."""
        search_path.append(provider="hoptim", path=f"file://{conf_dir()}")


def conf_dir() -> Path:
    """The folder ``hoptim/conf``: copies of the configs in a wheel, a link to the live ``conf/hoptim`` in a checkout."""
    spec = find_spec("hoptim")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "hoptim is not installed, though its Hydra plugin is: in a checkout of hoptim, pip install ."
        )
    return Path(spec.origin).parent / "conf"
