"""Which rank is missing, when a collective fails.

A collective says that it failed, seldom through whom. Then every rank that is still there says so in the store that
the ranks met by, and whether it waits too; the ranks that say nothing died, those that do not wait are late.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from zo.errors import RankError

GRACE_S = 2.0
"""How long a rank that lost another one waits for the others to answer, before it says who did not."""


class Peers:
    """The other ranks of a run, as this one sees them through the store."""

    def __init__(self, store: Any, rank: int, hosts: list[str], timeout: timedelta) -> None:
        """Begin to answer ranks that lost another one.

        Args:
            store: the one that all ranks met by.
            rank: this one.
            hosts: of all ranks, by rank.
            timeout: how long ranks wait for one another in a collective.
        """
        self.rank, self.ranks, self.timeout = rank, len(hosts), timeout
        self._store, self._hosts = store, hosts
        self._waiting, self._ends = set[int](), threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(store.clone(),), daemon=True)
        self._watcher.start()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What ranks do together; a rank that is not there ends it in an error that names that one.

        Raises:
            RankError: a rank died, or did not come in time.
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
        """Raise ``RuntimeError`` if a rank has lost another one; for use inside :meth:`together`."""
        if self._store.check(["lost"]):
            raise RuntimeError("a rank was lost")

    def close(self) -> None:
        """Answer no longer."""
        self._ends.set()
        self._watcher.join()

    def _lost(self, error: RuntimeError) -> str:
        said = " ".join(str(error).split())[:160]
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
            f"{', '.join(missing)} died, or was not there within mesh.timeout_s={self.timeout // timedelta(seconds=1)} "
            f"({said}); no step is lost: the same command goes on, and torchrun --max-restarts gives it by itself"
        )

    def _watch(self, store: Any) -> None:
        """When a rank has lost another one, tell it that this one lives, and whether it waits too."""
        with suppress(RuntimeError):  # Whoever keeps the store is gone: the collectives will tell.
            while not self._ends.wait(0.5):
                if store.check(["lost"]):
                    store.set(f"lives/{self.rank}", "")
                    while not self._waiting and not self._ends.wait(0.1):
                        pass
                    store.set(f"waits/{self.rank}", "")
                    return
