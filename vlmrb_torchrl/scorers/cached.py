"""Scores kept on disk: what one seed, process or run has had judged, no other asks again."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import is_positive, require, shown
from vlmrb_torchrl.frames import frame_digests
from vlmrb_torchrl.keys import CLIP, SCORE
from vlmrb_torchrl.scorers.base import ClipScorer, ScorerWrapper

_LOGGER = logging.getLogger("vlmrb_torchrl.scorers")
_FILE = "scores.sqlite"
_LOCK_SECONDS = 10.0
"""How long another process may write. A batch takes it milliseconds, so beyond this it hangs."""
_NO_FINGERPRINT = (
    "another judge could pass for it: write its class in a file, and name its arguments in its "
    "config and its weights in its revision"
)


class CachedScorer(ScorerWrapper, ClipScorer):
    """Answers from a folder of scores; asks the judge only about clips that it does not hold.

    A score is kept under a digest of the judge's `fingerprint` (its code, prompts, configuration
    and weights) and of the clip's frames, pixel by pixel. Any number of processes may share the
    folder. A cache that fails (disk full, no right to write, damaged) is logged once and left; the
    judge answers.

    B: clips in the batch.

    Args:
        scorer: The judge. It must read frames alone, answer the same ones the same, and have a
            `fingerprint`.
        folder: Where scores are kept, on a disk of this machine: SQLite's log does not work over
            a network. None: ``vlmrb_torchrl/scores`` in the user's cache folder.
        size_megabytes: Bound of the folder's database, with the scores that were not asked for
            longest given up first. A score takes about 0.1 kB; a log of some 4 MB stands beside.

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

    changes_no_score = frozenset({"folder", "size_megabytes"})

    def __init__(
        self,
        scorer: ClipScorer,
        folder: str | Path | None = None,
        size_megabytes: float = 256.0,
    ) -> None:
        super().__init__((CLIP,))
        if not isinstance(scorer, ClipScorer):
            raise TypeError(f"scorer is {shown(scorer)}: pass the ClipScorer whose scores to keep")
        if folder is not None and not isinstance(folder, (str, Path)):
            raise TypeError(f"folder is {shown(folder)}: pass the path of a folder")
        fits = scorer.in_keys == [CLIP] and scorer.deterministic
        remedy = (
            "it cannot be cached, only a judge that reads frames alone and answers the same ones "
            "the same, use it as it is"
        )
        require(fits, "scorer", scorer, remedy)
        known = scorer.fingerprint is not None
        require(known, "scorer", scorer, f"it cannot be cached, {_NO_FINGERPRINT}")
        positive = is_positive(size_megabytes)
        require(positive, "size_megabytes", size_megabytes, "it must be a number above 0")
        self.scorer = scorer
        self.frame_size = scorer.frame_size
        if folder is None:
            users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(users) / "vlmrb_torchrl" / "scores"
        self.folder = Path(folder).expanduser()
        self.size_megabytes = float(size_megabytes)
        self.hits = self.misses = 0
        self._cache: _Scores | None = None
        self._given_up = False

    @property
    def fingerprint(self) -> str | None:
        """The judge's: its scores are these."""
        return self.scorer.fingerprint

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens a connection of its own.
        return {**self.__dict__, "_cache": None, "_given_up": False}

    def load(self) -> None:
        """Load the judge and open the cache."""
        self.scorer.load()
        if not self._given_up:
            with self._giving_up():
                if self.fingerprint is None:  # it has loaded weights that it does not name
                    raise ValueError(_NO_FINGERPRINT)
                self._cache = self._cache or _Scores(self.folder, self.size_megabytes * 1e6)

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """The judge's scores, float32 ``[B]``, each of them asked for once."""
        self.load()
        clips = tensordict[CLIP]
        judge = self.fingerprint
        whose = f"{judge} {tuple(clips.shape[1:])} ".encode()
        keys = [
            hashlib.blake2b(whose + digest, digest_size=16).digest()
            for digest in frame_digests(clips)
        ]
        known: dict[bytes, float] = {}
        if self._cache is not None:
            with self._giving_up():
                known = self._cache.read(set(keys))
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, row)
        if first:
            rows = list(first.values())
            asked = self.scorer(TensorDict({CLIP: clips[rows]}, [len(rows)]))
            known.update(zip(first, asked[SCORE].tolist(), strict=True))
        scores = {key: score for key, score in known.items() if not math.isnan(score)}
        # A server may go over to another kind of answer.
        if self._cache is not None and scores and self.fingerprint == judge:
            with self._giving_up():
                self._cache.write(scores)
        self.misses += len(first)
        self.hits += len(keys) - len(first)
        return torch.tensor([known[key] for key in keys], dtype=torch.float32)

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


class _Scores:
    """Scores by key in one SQLite file; what was not asked for longest makes room.

    Several processes may use the file at once, and several threads this object. Whatever else than
    a score someone may have put there is taken for one that is missing.
    """

    def __init__(self, folder: Path, size_bytes: float) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._size_bytes = size_bytes
        self._lock = threading.Lock()  # a connection has one transaction at a time
        self.connection = sqlite3.connect(
            folder / _FILE, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
        )
        execute = self.connection.execute
        execute("PRAGMA trusted_schema = OFF")  # the file may be someone else's work
        execute("PRAGMA auto_vacuum = FULL")  # gives pages back when rows go
        _write_ahead(self.connection)
        execute("PRAGMA synchronous = NORMAL")  # no wait for the disk; a crash loses a few scores
        execute(
            "CREATE TABLE IF NOT EXISTS scores "
            "(key BLOB PRIMARY KEY, score REAL, used INTEGER) WITHOUT ROWID"
        )
        execute("CREATE INDEX IF NOT EXISTS by_use ON scores (used)")

    def read(self, keys: Collection[bytes]) -> dict[bytes, float]:
        """The scores of ``keys`` that are there."""
        ask = "SELECT score FROM scores WHERE key = ?"
        with self._lock:
            found = [(key, self.connection.execute(ask, (key,)).fetchone()) for key in keys]
        scores = {key: row[0] for key, row in found if row is not None}
        return {k: s for k, s in scores.items() if isinstance(s, float) and 0 <= s <= 1}

    def write(self, scores: Mapping[bytes, float]) -> None:
        """Keep ``scores``, those asked for just now; those that were there are marked as used."""
        with self._lock, self.connection:
            execute = self.connection.execute
            execute("BEGIN IMMEDIATE")
            (now,) = execute("SELECT coalesce(max(used), 0) + 1 FROM scores").fetchone()
            self.connection.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)",
                [(key, score, now) for key, score in scores.items()],
            )
            oldest = "SELECT key FROM scores ORDER BY used LIMIT 64"
            while self.size_bytes() > self._size_bytes:
                if not execute(f"DELETE FROM scores WHERE key IN ({oldest})").rowcount:
                    break

    def size_bytes(self) -> int:
        """What the file takes once the transaction ends."""
        names = ("page_count", "freelist_count", "page_size")
        pages, free, each = (
            self.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names
        )
        return int((pages - free) * each)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Let readers and a writer not wait for each other; the file keeps that mode."""
    # Of two processes that switch a new file, one is refused at once, whatever the timeout.
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
