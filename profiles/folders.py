"""Where this platform keeps what belongs to a user."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Where the platform wants what can be made again: $XDG_CACHE_HOME or ~/.cache, then `lensc`; None without a home."""
    return _lensc("XDG_CACHE_HOME", ".cache", "Caches")


def profile_folder() -> Path | None:
    """Where the user's own device profiles lie: `lensc/profiles` in $XDG_DATA_HOME or ~/.local/share, or where the
    platform keeps data; None without a home.
    """
    base = _lensc("XDG_DATA_HOME", ".local/share", "Application Support")
    return None if base is None else base / "profiles"


def _lensc(variable: str, usual: str, on_macos: str) -> Path | None:
    """The folder `lensc` where `variable` says, else `usual` in the home, or where Windows or macOS have such things."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / on_macos
    else:
        stated = Path(os.environ.get(variable) or ".")
        base = stated if stated.is_absolute() else home / usual
    return base / "lensc"
