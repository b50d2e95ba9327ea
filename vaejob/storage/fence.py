"""Which start of a job may write to its run: each takes the next number, and only the highest goes on.

A scheduler may start a job again while the machines of the start before still work, and a machine that was cut off may
come back. Numbers do not depend on clocks, and are taken under a condition (create only if absent), so that two starts at
the same moment have two numbers. Where a store has no conditional writes, starts within the same second may share a number;
the later one is then still found, since it has replaced the words of the other, but not before both have written rows.
"""

import re
from typing import NamedTuple

from vaejob.errors import ObjectMissing, OutsideError
from vaejob.storage.bucket import Bucket, NotOffered


class TakenOver(OutsideError):  # noqa: N818 - a state of the run
    """A later start of the job writes to the run now; this one must not, and must not be started again either."""

    exit_status = 4


class Token(NamedTuple):
    """The right of one start to write to the run, until the next one takes a number."""

    number: int
    text: str
    """Its configuration; the first line says by whom it was started, and when."""
    exclusive: bool = True
    """Whether the store keeps conditions, so that no other start can have the same number."""

    @property
    def who(self) -> str:
        return f"start {self.number} ({_by_whom(self.text)})"

    def check(self, run: Bucket) -> None:
        """One small request. Raises TakenOver if there is a later start."""
        if run.size(token_key(self.number + 1)) is not None:
            newest = newest_token(run)
        elif self.exclusive or not self.number or _read(run, self.number) == self.text:
            return
        else:
            newest = Token(self.number, _read(run, self.number))
        raise TakenOver(f"{run.url}: {newest.who} has taken over this run; {self.who} ends here")


NOBODY = Token(0, "# no start is noted in the run")


def token_key(number: int) -> str:
    return f"attempts/{number:06d}.yaml"


def take_token(run: Bucket, text: str) -> Token:
    """The next number, with this text kept under it. One more request finds whether the store keeps the condition."""
    while True:
        number, data = _highest(run) + 1, text.encode()
        try:
            if not run.create(token_key(number), data):
                continue  # another start was faster
            exclusive = not run.create(token_key(number), b"# a store that keeps conditions refuses this\n")
        except NotOffered:
            exclusive = False
        if not exclusive:
            run.write(token_key(number), data)
        return Token(number, text, exclusive)


def newest_token(run: Bucket) -> Token:
    """Of the start that is in charge now; NOBODY if none is noted."""
    number = _highest(run)
    return Token(number, _read(run, number)) if number else NOBODY


def _highest(run: Bucket) -> int:
    found = (re.fullmatch(r"attempts/(\d{6,})\.yaml", key) for key in run.keys("attempts/"))
    return max((int(match[1]) for match in found if match), default=0)


def _read(run: Bucket, number: int) -> str:
    try:
        return run.read(token_key(number)).decode(errors="replace")
    except ObjectMissing:
        return "# unknown: its note is gone"


def _by_whom(text: str) -> str:
    return text.partition("\n")[0].lstrip("# ")
