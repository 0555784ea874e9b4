"""Folders: where outputs and cached checkpoints go."""

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

    COLQWEN_LAB_OUTPUTS, else `outputs/` in the checkout, else `outputs/` in the current folder.
    Raises BadInput if it cannot be written.
    """
    checkout = PACKAGE.parent
    root = checkout if (checkout / "pyproject.toml").exists() else Path.cwd()
    return writable_folder(Path(os.environ.get("COLQWEN_LAB_OUTPUTS") or root / "outputs"))


def in_use(folder: Path) -> bool:
    """Whether `folder` is a file, or a folder that holds something; BadInput for an odd name."""
    try:
        return not stat.S_ISDIR(os.stat(folder).st_mode) or any(folder.iterdir())
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise _cannot_make(folder, error) from None


def writable_folder(folder: Path) -> Path:
    """`folder`, created if needed; BadInput if it cannot be created or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _cannot_make(folder, error) from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"cannot write to the folder {folder}; name a writable folder")
    return folder


def _cannot_make(folder: Path, error: Exception) -> BadInput:
    reason = getattr(error, "strerror", None) or str(error)
    return BadInput(f"cannot create the folder {folder}: {reason}; name a writable folder")
