"""A run's whole configuration, as verl's own entry point composes it, in about a second: neither verl nor torch is
imported, so that a mistake in it costs no more than that.
"""

import gc
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rema_verl.errors import UserError

NOISE = ("Config search path:", "provider=", "full_key:", "object_type=", "reference_type=", "See https://")


def verl_folder() -> Path:
    """Where verl is installed.

    Raises:
        UserError: nowhere.
    """
    found = importlib.util.find_spec("verl")  # does not import it
    if found is None or found.origin is None:
        raise UserError("verl is not installed (pip install 'rema-verl[cpu]' or 'rema-verl[vllm]')")
    return Path(found.origin).parent


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration ``name`` of ours or of verl's, with overrides as on the command line.

    Raises:
        UserError: what Hydra has to say about an option, on one line.
    """
    folder = verl_folder() / "trainer" / "config"
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    from rema_verl.config import searchpath  # noqa: F401  (adds this folder to Hydra's search path)

    GlobalHydra.instance().clear()
    plain, collecting = yaml.SafeLoader, gc.isenabled()
    gc.disable()  # nothing of this is garbage before it is done
    try:
        # OmegaConf derives its loader from this name. libyaml's gives the same, several times faster.
        yaml.SafeLoader = getattr(yaml, "CSafeLoader", plain)
        with initialize_config_dir(str(folder), version_base=None):
            return hydra_compose(name, list(overrides))
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(one_line(e)) from None
    finally:
        yaml.SafeLoader = plain
        if collecting:
            gc.enable()


def one_line(error: Exception) -> str:
    """Hydra's message without what only its developers want to know.

    >>> one_line(ValueError("Could not override 'a.b'.\\nTo append to your config use +a.b=1\\n    full_key: a.b"))
    "Could not override 'a.b'. To append to your config use +a.b=1"
    """
    lines = (line.strip() for line in str(error).splitlines())
    said = " ".join(line for line in lines if line and not line.startswith(NOISE))[:400]
    where = getattr(error, "override", None) or getattr(error, "full_key", None)
    return f"{where}: {said}" if where and where not in said else said
