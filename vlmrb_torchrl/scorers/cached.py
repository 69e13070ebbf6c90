"""Scores kept on disk: what one seed, process or run has had judged, no other asks again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from vlmrb_torchrl.frames import frame_digests
from vlmrb_torchrl.keys import CLIP, SCORE
from vlmrb_torchrl.scorers.base import ClipScorer

_LOGGER = logging.getLogger("vlmrb_torchrl.scorers")
_LOCK_SECONDS = 10.0
"""How long another process may write. A batch takes it milliseconds, so beyond this it hangs."""


class CachedScorer(ClipScorer):
    """Answers from a folder of scores; asks the judge only about clips that it does not hold.

    A score is kept under a digest of the judge's fingerprint (its configuration and weights) and
    of the clip's frames, pixel by pixel. Any number of processes may share the folder. A cache
    that fails (disk full, no right to write, damaged) is logged once and left; the judge answers.

    B: clips in the batch.

    Args:
        scorer: The judge. It must read frames alone and answer the same ones the same.
        folder: Where scores are kept, on a disk of this machine: SQLite's log does not work over
            a network. None: ``vlmrb_torchrl/scores`` in the user's cache folder.
        size_megabytes: Bound of the folder's database, with the scores that were not asked for
            longest given up first. A score takes about 0.2 kB; a log of some 4 MB stands beside.

    Attributes:
        hits: Clips answered without the judge, those that a batch holds twice included. Counted
            in the process that scores.
        misses: Clips that the judge was asked about.

    Raises:
        ValueError: The judge's answers cannot be kept, or a size that is not positive.

    Example:
        >>> judge = CachedScorer(EmbeddedJudge(), "/tmp/scores")
        >>> judge(clips)["score"], judge.misses  # doctest: +SKIP
    """

    def __init__(
        self,
        scorer: ClipScorer,
        folder: str | Path | None = None,
        size_megabytes: float = 256.0,
    ) -> None:
        super().__init__((CLIP,))
        if scorer.in_keys != [CLIP] or not scorer.deterministic:
            raise ValueError(
                f"scorer={scorer!r} cannot be cached, only one that reads frames alone and answers "
                "the same ones the same: use it as it is."
            )
        if not size_megabytes > 0:
            raise ValueError(f"size_megabytes={size_megabytes}: it must be positive.")
        self.scorer = scorer
        self.frame_size = scorer.frame_size
        self.folder = Path(folder).expanduser() if folder is not None else _default_folder()
        self.size_megabytes = float(size_megabytes)
        self.hits = self.misses = 0
        self._cache: Any = None
        self._given_up = False
        self._judge: str | None = None

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """What the judge's scores depend on; not on the folder."""
        return (("scorer", type(self.scorer).__name__), *self.scorer.config)

    @property
    def revision(self) -> str:
        """The judge's."""
        return self.scorer.revision

    @property
    def fingerprint(self) -> str:
        """The judge's: its scores are these."""
        return self.scorer.fingerprint

    @property
    def device(self) -> torch.device:
        """Where the judge computes."""
        return self.scorer.device

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens a connection of its own.
        return {**self.__dict__, "_cache": None, "_given_up": False, "_judge": None}

    def load(self) -> None:
        """Load the judge, whose fingerprint is known only then, and open the cache.

        Raises:
            ImportError: diskcache is not installed.
        """
        self.scorer.load()
        # Once: it may cost a digest of all weights.
        self._judge = self._judge or self.fingerprint
        if self._cache is not None or self._given_up:
            return
        try:
            import diskcache  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"CachedScorer cannot open its cache ({error}): pip install 'vlmrb-torchrl[vlm]'."
            ) from error
        with self._giving_up():
            self._cache = _open(self.folder, round(self.size_megabytes * 1e6))

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """The judge's scores, float32 ``[B]``, each of them asked for once."""
        self.load()
        clips = tensordict[CLIP]
        keys = self._keys(clips)
        known = self._read(dict.fromkeys(keys))
        first: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, row)
        if first:
            rows = list(first.values())
            asked = self.scorer(TensorDict({CLIP: clips[rows]}, [len(rows)]))
            judged = dict(zip(first, asked[SCORE].tolist(), strict=True))
            self._write(judged)
            known.update(judged)
        self.misses += len(first)
        self.hits += len(keys) - len(first)
        return torch.tensor([known[key] for key in keys], dtype=torch.float32)

    def _keys(self, clips: Tensor) -> list[str]:
        """What the scores of ``[B, F, 3, H, W]`` are kept under."""
        judge = f"{self._judge} {tuple(clips.shape[1:])} {clips.dtype} ".encode()
        return [
            hashlib.blake2b(judge + digest, digest_size=16).hexdigest()
            for digest in frame_digests(clips)
        ]

    def _read(self, keys: Iterable[str]) -> dict[str, float]:
        """The scores that are there. What is no score, someone else has put in: a miss."""
        if self._cache is None:
            return {}
        with self._giving_up(), self._cache.transact():
            found = {key: self._cache.get(key) for key in keys}
            return {k: s for k, s in found.items() if isinstance(s, float) and 0 <= s <= 1}
        return {}

    def _write(self, scores: Mapping[str, float]) -> None:
        if self._cache is None:
            return
        with self._giving_up():
            with self._cache.transact():
                for key, score in scores.items():
                    self._cache.set(key, score)
            # Not within the transaction: SQLite gives pages back at its end, so that every score
            # written would throw others out until then.
            self._cache.cull()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Whatever goes wrong with the cache is logged, and it is not asked again."""
        try:
            yield
        except Exception as error:
            self._cache, self._given_up = None, True
            _LOGGER.warning(
                "the score cache in %s is left, the judge answers alone: %r", self.folder, error
            )


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vlmrb_torchrl" / "scores"


def _open(folder: Path, size_bytes: int) -> Any:
    """The cache in ``folder``: str keys and float values, both SQLite's own types."""
    import diskcache

    class Numbers(diskcache.Disk):  # type: ignore[misc]
        """Unpickles nothing and touches no file.

        diskcache 5.6 unpickles what a row says is pickled and deletes the file that a row names
        (CVE-2025-69872): whoever can write into the folder could run code here. Our rows hold
        numbers and name no files.
        """

        def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> object:
            return value if mode == diskcache.core.MODE_RAW else None

        def get(self, key: object, raw: bool) -> object:
            return key

        def remove(self, file_path: str) -> None:
            """Nothing."""

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return diskcache.Cache(
        folder,
        timeout=_LOCK_SECONDS,
        disk=Numbers,
        size_limit=size_bytes,
        eviction_policy="least-recently-used",
        cull_limit=0,
        # A file that another process truncates would end this one if it were mapped (SIGBUS).
        sqlite_mmap_size=0,
    )
