"""Files that no person put among their data: what operating systems, file servers and notebooks leave behind."""

from __future__ import annotations

from collections.abc import Mapping

# Folders and files by name, in lower case; a name that begins with a dot is one in any case (`._1.jpg`, `.DS_Store`).
NAMES = frozenset(
    {"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)


def litter(path: str) -> str | None:
    """The part of a relative path that makes it litter, as `._*` where a Macintosh names it after its file; or None."""
    for part in path.replace("!/", "/").split("/"):
        if part.startswith("._"):
            return "._*"
        if part.lower() in NAMES or (part.startswith(".") and part.strip(".")):
            return part
    return None


def told(passed_over: Mapping[str, int]) -> str:
    """One line about what was passed over, the most frequent first."""
    ranked = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{name.strip()} ({count:,})" for name, count in ranked)
    return f"passed over {sum(passed_over.values()):,} files that systems and programs leave behind: {shown}"
