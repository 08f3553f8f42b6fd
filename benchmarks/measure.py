"""How things are measured: interleaved repeats in one process, and peak memory in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Row:
    """One comparison. Ratios are the result; seconds only hold for the machine and the moment.

    Attributes:
        name: what was compared, and at which size.
        seconds: best or median time of each side, by name; the first is ours.
        ratio: time (or memory) of the last side over ours.
        aim: what the ratio should reach, or None.
        note: what else was seen (agreement, memory).
    """

    name: str
    seconds: dict[str, float]
    ratio: float
    aim: float | None = None
    note: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


PEAK_RESET = Path("/proc/self/clear_refs")

clock: Callable[[], float] = time.perf_counter


def count_processor_time() -> None:
    """Count processor time from now on: on a busy machine, with one thread, the ratios then still hold."""
    global clock
    clock = time.process_time


def best_seconds(repeats: int, **sides: Callable[[], object]) -> dict[str, float]:
    """Best time of each side. Sides take turns, so that a busy machine disturbs them alike."""
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(repeats + 1):  # the first turn warms up
        for name, side in sides.items():
            start = clock()
            side()
            if turn:
                best[name] = min(best[name], clock() - start)
    return best


def extra_mebibytes(task: Callable[..., object], *args: object) -> float:
    """By how many MiB a fresh process's peak memory exceeds what it held before (Linux), at least 1.

    `task(*args)` prepares, uncounted, and returns the function that is measured.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_growth, args=(sender, task, args))
    process.start()
    sender.close()
    try:
        return max(1.0, receiver.recv())
    except EOFError:
        raise RuntimeError("the process that measures memory died: is there enough of it?") from None
    finally:
        process.join()


def _report_growth(sender, task: Callable[..., Callable[[], object]], args: tuple) -> None:
    run = task(*args)
    PEAK_RESET.write_text("5")  # the peak starts again from what is held now
    before = _status("VmRSS")
    run()
    sender.send((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
