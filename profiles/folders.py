"""Where this platform keeps what belongs to a user."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Where the platform wants what can be made again: $XDG_CACHE_HOME or ~/.cache, then `lensc`; None without a home."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        stated = Path(os.environ.get("XDG_CACHE_HOME") or ".")
        base = stated if stated.is_absolute() else home / ".cache"
    return base / "lensc"


def profile_folder() -> Path | None:
    """Where the user's own device profiles lie: `lensc/profiles` in $XDG_DATA_HOME or ~/.local/share, or where the
    platform keeps data; None without a home.
    """
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        stated = Path(os.environ.get("XDG_DATA_HOME") or ".")
        base = stated if stated.is_absolute() else home / ".local" / "share"
    return base / "lensc" / "profiles"
