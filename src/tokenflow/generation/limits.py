"""How many pictures are drawn in one go: the same limit for the command line and for Python."""

from __future__ import annotations

from tokenflow.errors import UserError

MOST_PICTURES = 100_000  # of one run or call


def check_count(pictures: int) -> None:
    """Raise UserError for more than `MOST_PICTURES`."""
    if pictures > MOST_PICTURES:
        raise UserError(f"{pictures:,} pictures are too many for one run; draw at most {MOST_PICTURES:,}")
