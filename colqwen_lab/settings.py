"""What a person may set once for all runs: where outputs and cached checkpoints lie, and the default size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import platformdirs

from colqwen_lab.errors import BadInput

PACKAGE = Path(__file__).parent
DATA = PACKAGE / "data"


def cache_folder() -> Path:
    """The folder of checkpoints made here: COLQWEN_LAB_CACHE, else the user's cache folder."""
    return Path(os.environ.get("COLQWEN_LAB_CACHE") or platformdirs.user_cache_dir("colqwen-lab"))


def outputs_folder() -> Path:
    """The folder that runs write to, the same from every current folder.

    COLQWEN_LAB_OUTPUTS, else `outputs/` beside pyproject.toml in a checkout, else `outputs/` here.

    Raises:
        BadInput: the folder cannot be made or written.
    """
    checkout = PACKAGE.parent
    root = checkout if (checkout / "pyproject.toml").exists() else Path.cwd()
    return writable_folder(Path(os.environ.get("COLQWEN_LAB_OUTPUTS") or root / "outputs"))


def in_use(folder: Path) -> bool:
    """Whether there is a file, or a folder that holds something.

    Raises:
        BadInput: no folder can have this name, or it cannot be looked into.
    """
    try:
        return not stat.S_ISDIR(os.stat(folder).st_mode) or any(folder.iterdir())
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot make the folder {folder}: {_why(error)}; name one that can be written"
        ) from None


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def writable_folder(folder: Path) -> Path:
    """`folder`, made if need be.

    Raises:
        BadInput: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot make the folder {folder}: {_why(error)}; name one that can be written"
        ) from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"cannot write to the folder {folder}; name one that can be written")
    return folder
