"""A ledger that is written beside training in the same process, so that training goes on while the bucket is out of reach."""

import queue
import threading
from collections.abc import Sequence

from vaejob.training.ledger import Ledger
from vaejob.training.worker import Report


class LedgerBeside:
    """Hands reports to a ledger in their order, from a thread of its own, on which its events are told as well.

    Reports that wait are plain sums, about a kilobyte each, no more than the job makes within checkpoint.outage_seconds.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._reports = queue.Queue[Sequence[Sequence[Report]]]()
        self._failure: Exception | None = None
        threading.Thread(target=self._write_all, name="ledger", daemon=True).start()

    def add(self, moments: Sequence[Sequence[Report]]) -> None:
        """Without waiting for the bucket. Raises what went wrong with earlier reports."""
        self._raise_failure()
        self._reports.put(moments)

    def wait(self) -> None:
        """Until everything handed in is in the bucket. Raises what went wrong."""
        self._reports.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write_all(self) -> None:
        while True:
            moments = self._reports.get()
            try:
                if self._failure is None:  # behind what was not written nothing is
                    self._ledger.add(moments)
            except Exception as error:  # raised again on the training thread
                self._failure = error
            finally:
                self._reports.task_done()
