"""The commit of this source tree. This module needs the standard library alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git_commit() -> str | None:
    """Return the commit of this source tree, with "+changes" if files differ; None outside a repository."""
    if not (ROOT / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "--verify", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
