"""Failure attribution: find the ranks that made a collective fail.

The error of a collective seldom names the rank that caused it. So each rank runs a thread that
watches the rendezvous store. When one rank reports a failure there, the others answer with two
keys: that they are alive, and that they wait in a collective too. Ranks without the first key died;
ranks without the second are late.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from zo.errors import RankError, one_line

GRACE_S = 2.0
"""Seconds that a rank whose collective failed leaves the others to answer."""


class Peers:
    """The other ranks of a run, seen through the rendezvous store."""

    def __init__(self, store: Any, rank: int, hosts: list[str], timeout: timedelta) -> None:
        """Start the thread that answers ranks whose collective failed.

        Args:
            store: the store that all ranks rendezvoused with.
            rank: of this process.
            hosts: host name of each rank.
            timeout: of collectives.
        """
        self.rank, self.ranks, self.timeout = rank, len(hosts), timeout
        self._store, self._hosts = store, hosts
        self._waiting, self._ends = set[int](), threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(store.clone(),), daemon=True)
        self._watcher.start()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn a failed collective in this block into an error that names the missing ranks.

        Raises:
            RankError: a rank died, or did not join the collective in time.
        """
        thread = threading.get_ident()
        self._waiting.add(thread)
        try:
            yield
        except RuntimeError as error:
            raise RankError(self._lost(error)) from error
        finally:
            self._waiting.discard(thread)

    def check(self) -> None:
        """Raise ``RuntimeError`` if a rank reported a failure; call it inside :meth:`together`."""
        if self._store.check(["lost"]):
            raise RuntimeError("a rank was lost")

    def close(self) -> None:
        """Stop the thread."""
        self._ends.set()
        self._watcher.join()

    def _lost(self, error: RuntimeError) -> str:
        """Report the failure to the other ranks and return a message with those missing."""
        said = one_line(error, 160)
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        dead, late = others, others
        with suppress(RuntimeError):
            self._store.set("lost", "")
            until = time.monotonic() + GRACE_S
            while time.monotonic() < until and dead:
                dead = [rank for rank in dead if not self._store.check([f"lives/{rank}"])]
                time.sleep(0.5)
            late = [rank for rank in others if not self._store.check([f"waits/{rank}"])]
        names = [f"rank {rank} (host {self._hosts[rank]})" for rank in dead or late]
        missing = names if len(names) < len(others) or self.ranks == 2 else ["another rank"]
        return (
            f"{', '.join(missing)} died, or did not respond within "
            f"mesh.timeout_s={self.timeout // timedelta(seconds=1)} ({said}); no step is lost: the "
            "same command resumes the run, and torchrun --max-restarts does so automatically"
        )

    def _watch(self, store: Any) -> None:
        """Once a rank reports a failure, answer that this one is alive, and when it waits too."""
        with suppress(RuntimeError):  # The store is gone, so the collectives fail as well.
            while not self._ends.wait(0.5):
                if store.check(["lost"]):
                    store.set(f"lives/{self.rank}", "")
                    while not self._waiting and not self._ends.wait(0.1):
                        pass
                    store.set(f"waits/{self.rank}", "")
                    return
