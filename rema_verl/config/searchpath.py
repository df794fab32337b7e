"""Lets Hydra find this package's YAML, so that verl's own entry point takes ``--config-name rema_trainer``.

Registered as soon as Hydra is imported. (Adding ``hydra.searchpath=[pkg://rema_verl.config]`` on the command line does
not do: Hydra looks for the primary config before it reads that option.)
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class ReMASearchPath(SearchPathPlugin):
    """Appends ``pkg://rema_verl.config`` to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("rema-verl", "pkg://rema_verl.config")


Plugins.instance().register(ReMASearchPath)
