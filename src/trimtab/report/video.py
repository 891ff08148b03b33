"""The video of a run inside its report: base64 in the page, which stays one file."""

from __future__ import annotations

import base64
from pathlib import Path

from trimtab.report.transcripts import clean

VIDEOS = {"video.mp4": "video/mp4", "video.gif": "image/gif"}
LARGEST = 3 * 2**20  # bytes; a larger one is named, not embedded


def video_html(folder: Path) -> str:
    """The section's inside; empty when the run has no video."""
    found = [folder / name for name in VIDEOS if (folder / name).is_file()]
    if not found:
        return ""
    path = max(found, key=lambda p: p.stat().st_mtime)
    note = folder / "video.txt"
    told = note.read_text(errors="replace").strip() if note.is_file() else ""
    caption = f"<figcaption>{clean(told)}</figcaption>" if told else ""
    if path.stat().st_size > LARGEST:
        return (
            f'<p class="lead">{clean(path.name)} lies beside this page; it is too large to be part of it.</p>{caption}'
        )
    kind, data = VIDEOS[path.name], base64.b64encode(path.read_bytes()).decode()
    source = f"data:{kind};base64,{data}"
    if kind.startswith("video"):
        shown = f'<video src="{source}" controls muted loop playsinline style="max-width:100%"></video>'
    else:
        shown = f'<img src="{source}" alt="an episode" style="max-width:100%">'
    return f"<figure>{shown}{caption}</figure>"
