"""The page to look at: which clips it shows, how they travel in one file, and the file itself.

F: frames of a clip, U: distinct frames among them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from vlmrb_torchrl.clips import ClipRenderTransform
from vlmrb_torchrl.frames import frame_digests
from vlmrb_torchrl.judge.report import Verdict
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.keys import CLIP, EVENTS

LARGEST = 192
"""Pixels along a frame's longer edge, at most: a hundred clips stay a few megabytes."""
OUTCOMES = ("false positive", "false negative", "true positive", "true negative")


def outcomes(score: NDArray[np.float64], label: NDArray[np.bool_], threshold: float) -> list[str]:
    """What a clip's answer is, ``[N]``, in the words of ``OUTCOMES``."""
    right = (score >= threshold) == label
    return [
        f"{'true' if r else 'false'} {'positive' if y else 'negative'}"
        for r, y in zip(right, score >= threshold, strict=True)
    ]


def choose(verdict: Verdict, settings: Settings) -> list[dict[str, Any]]:
    """The clips shown of one verdict: of each outcome ``settings.gallery`` at most.

    Mistakes come in the order of how sure the judge was, right answers are drawn at random.
    """
    score, label = verdict.answers.score, verdict.answers.label
    what = np.array(outcomes(score, label, settings.threshold))
    random = np.random.default_rng(settings.seed)
    entries = []
    for outcome in OUTCOMES:
        found = np.flatnonzero(what == outcome)
        if outcome == "false positive":
            found = found[np.argsort(-score[found], kind="stable")]
        elif outcome == "false negative":
            found = found[np.argsort(score[found], kind="stable")]
        else:
            found = random.permutation(found)
        entries += [
            {"clip": int(k), "score": float(score[k]), "label": bool(label[k]), "outcome": outcome}
            for k in found[: settings.gallery]
        ]
    return entries


def gallery(verdicts: Sequence[Verdict], clips: TensorDict, settings: Settings) -> dict[str, Any]:
    """What the page's script is given: judges with their entries, and each clip once."""
    judges: list[dict[str, Any]] = [
        {"name": v.question.name, "prompts": v.question.prompts, "entries": choose(v, settings)}
        for v in verdicts
    ]
    wanted = sorted({entry["clip"] for judge in judges for entry in judge["entries"]})
    names = settings.env.event_names
    draw = ClipRenderTransform(settings.draw)
    shown = {}
    for k in wanted:
        clip = clips[k]
        happened = [name for name, seen in zip(names, clips[EVENTS][k], strict=True) if seen]
        shown[k] = {
            **sprite_sheet(draw(clip.select("render_state").copy())[CLIP]),
            "episode": int(clip["episode"]),
            "first": int(clip["first"]),
            "transitions": int(clip["transitions"]),
            "events": happened,
        }
    return {"judges": judges, "clips": shown, "outcomes": OUTCOMES}


def sprite_sheet(frames: Tensor) -> dict[str, Any]:
    """Frames uint8 ``[F, 3, H, W]`` as one picture of the U distinct ones.

    Returns:
        ``sheet``: a PNG as a data URI, the frames in reading order; ``columns`` of it; ``size``
        of a frame (width, height); ``order``: which of the U frames is shown when.
    """
    from PIL import Image

    place: dict[bytes, int] = {}
    order = [place.setdefault(digest, len(place)) for digest in frame_digests(frames)]
    distinct = frames[[order.index(k) for k in range(len(place))]]
    if (longest := max(distinct.shape[-2:])) > LARGEST:
        height, width = (max(1, edge * LARGEST // longest) for edge in distinct.shape[-2:])
        resized = torch.nn.functional.interpolate(distinct.float(), (height, width), mode="area")
        distinct = resized.round().byte()
    U, channels, height, width = distinct.shape
    columns = math.ceil(math.sqrt(U))
    sheet = np.zeros((-(-U // columns) * columns, height, width, channels), np.uint8)
    sheet[:U] = distinct.permute(0, 2, 3, 1).cpu().numpy()
    rows = sheet.reshape(-1, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    file = io.BytesIO()
    picture = Image.fromarray(rows.reshape(-1, columns * width, channels))
    picture.save(file, "PNG", optimize=True)
    uri = data_uri(file.getvalue())
    return {"sheet": uri, "columns": columns, "size": (width, height), "order": order}


def data_uri(png: bytes) -> str:
    """A picture inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def page(**parts: Any) -> str:
    """Fill ``report.html``: all text is escaped, and nothing is fetched from anywhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("vlmrb_torchrl.judge", "page")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return jinja.get_template("report.html").render(**parts)
