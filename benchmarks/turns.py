"""Lets programs take turns, each in a process of its own, so that their speeds can be compared on a
machine whose own speed drifts.

A program calls `take` with an iterator over what it does. While one runs, the others are stopped by
a signal, with their threads and workers, those that read ahead included.
"""

import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

SETTLE = 0.5  # seconds of each turn before anything counts
ENVIRONMENT = {
    'CUDA_VISIBLE_DEVICES': '-1',
    'KERAS_BACKEND': 'tensorflow',
    'TF_CPP_MIN_LOG_LEVEL': '2',
}


@dataclasses.dataclass
class Measured:
    """What was seen of a program.

    Attributes:
        speeds: a number for each round.
        peak_bytes: the most memory that it had at once, without that of its workers; 0 where the
            system is not Linux.
    """

    speeds: list[float]
    peak_bytes: int = 0


def measure(
    commands: Mapping[str, Sequence[str]],
    rounds: int,
    seconds: float,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> dict[str, Measured]:
    """Lets programs take turns.

    A first round, which warms up, is left out.

    Args:
        commands: {name: command line of a program that calls `take`}.
        seconds: of a turn.
        environment: variables added to those of this process.
    """
    peers: dict[str, Peer] = {}
    found = {name: Measured([]) for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, command in commands.items():
                log = os.path.join(folder, f'{len(peers)}.log')
                peers[name] = Peer(name, command, log, environment)
            for _ in range(rounds + 1):
                for name, peer in peers.items():
                    found[name].speeds.append(peer.speed(seconds))
            for name, peer in peers.items():
                found[name].peak_bytes = peer.peak_bytes()
        finally:
            for peer in peers.values():
                peer.end()
    for measured in found.values():
        del measured.speeds[0]
    return found


def ratio(speeds: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, the least and the largest ratio of two speeds within a round."""
    ratios = [speed / other for speed, other in zip(speeds, others, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


class Peer:
    """A program in a process of its own, which is stopped whenever it is not its turn."""

    def __init__(self, name: str, command: Sequence[str], log: str, environment: Mapping[str, str]):
        self.name, self.log = name, log
        with open(log, 'w') as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                preexec_fn=os.setpgrp,
            )  # a group: its workers are stopped with it
        self._answer()  # it is ready
        self._signal(signal.SIGSTOP)

    def speed(self, seconds: float) -> float:
        """Gives it a turn; returns what it did in a second."""
        self._signal(signal.SIGCONT)
        print(seconds, file=self.process.stdin, flush=True)
        speed = float(self._answer())
        self._signal(signal.SIGSTOP)
        return speed

    def peak_bytes(self) -> int:
        status = f'/proc/{self.process.pid}/status'
        if not os.path.exists(status):
            return 0
        with open(status) as file:
            peak = next(line for line in file if line.startswith('VmHWM:'))
        return int(peak.split()[1]) * 1024  # the line counts in KiB

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            with open(self.log) as log:
                said = log.read()
            sys.exit(f'{said}error: {self.name} ended with status {self.process.wait()}')
        return answer

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def take(work: Iterator[int]) -> None:
    """Answers each number of seconds on standard input with the amount of work done in a second.

    Args:
        work: the amount of each piece, such as the images of a batch, without end.
    """
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what a library prints is no answer
    next(work)
    print('ready', file=answers, flush=True)
    for line in sys.stdin:
        _work_for(work, SETTLE)
        amount, seconds = _work_for(work, float(line))
        print(amount / seconds, file=answers, flush=True)


def _work_for(work: Iterator[int], seconds: float) -> tuple[int, float]:
    """Returns the amount done in a time of at least `seconds`, and the time."""
    began, amount = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        amount += next(work)
    return amount, time.perf_counter() - began
