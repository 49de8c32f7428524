"""Runs cases against targets and counts the outcomes.

A case is either accepted, with a result whose invariants hold, or rejected with a TypeError or ValueError that names an
argument (of a file: its path), and then nothing has changed. Anything else is a failure: another exception, an error
that names nothing, a broken invariant, changed state, a case that takes SLOW seconds, or code executed from a file.
"""

import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.ways_out import has_way_out

SLOW = 30.0  # seconds on a busy core; most cases take a millisecond
CHUNK = 500  # cases of one run of hypothesis, which keeps all of them in memory
PACKAGE = Path(__file__).parents[2]


def nothing(*_: object) -> tuple[object, ...]:
    return ()


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        run: the call.
        names: an error's message must contain one of these words.
        told: the arguments of the call, for debugging a failure.
        check: raises AssertionError if an invariant of the result does not hold.
        state: tensors and plain values that an error must leave unchanged.
        late: an error with this text may change the state, as documented.
        reset: called after the case.
    """

    run: Callable[[], Any]
    names: tuple[str, ...]
    told: object = None
    check: Callable[[Any], object] = nothing
    state: Callable[[], tuple[object, ...]] = nothing
    late: str | None = None
    reset: Callable[[], object] = nothing


@dataclass
class Outcome:
    """The outcome of the cases of one target."""

    target: str
    engine: str = "hypothesis"
    cases: int = 0
    accepted: int = 0
    rejected: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        numbers = f"{self.cases:>7} cases {self.accepted:>7} accepted {self.rejected:>7} rejected"
        return f"{self.target:<28} {numbers} {sum(self.failures.values()):>5} failures {self.seconds:>7.1f} s"


class UnlawfulError(BaseException):
    """An error that no handler of the package may swallow."""


class HangError(UnlawfulError):
    """Raised when a case takes too long."""


class Run:
    """Runs cases and counts their outcomes."""

    def __init__(self, target: str, engine: str = "hypothesis", verbose: bool = False) -> None:
        self.outcome, self.verbose = Outcome(target, engine), verbose
        self._start = time.perf_counter()

    def __call__(self, case: Case) -> None:
        self.outcome.cases += 1
        before = [_copy(value) for value in case.state()]
        try:
            with warnings.catch_warnings(), _in_time():
                warnings.simplefilter("ignore")
                result = case.run()
                case.check(result)
            self.outcome.accepted += 1
        except (Exception, UnlawfulError) as error:
            self._judge(case, error, before)
        finally:
            case.reset()
        self.outcome.seconds = time.perf_counter() - self._start

    def _judge(self, case: Case, error: BaseException, before: list[Any]) -> None:
        if of_the_model(error):  # the model's own exceptions reach the caller
            self.outcome.rejected += 1
            return
        if not isinstance(error, TypeError | ValueError):
            self._failed(case, error, "raised")
            return
        if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error)) for name in case.names):
            self._failed(case, error, "names no argument")
            return
        if not has_way_out(str(error)):
            self._failed(case, error, "has no way out")
            return
        self.outcome.rejected += 1
        if case.late is not None and case.late in str(error):
            return
        if not all(_same(a, b) for a, b in zip(before, case.state(), strict=True)):
            self._failed(case, error, "changed state")

    def _failed(self, case: Case, error: BaseException, how: str) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(PACKAGE))]
        ours = [f for f in frames if "/tests/fuzz/" not in f.filename] or frames
        where = f"{Path(ours[-1].filename).relative_to(PACKAGE)}, {ours[-1].name}" if ours else "elsewhere"
        what = re.sub(r"/\S+/|\d+|0x[0-9a-f]+|\[[^]]*\]", "#", f"{type(error).__name__}: {error}".split("\n")[0])[:160]
        key = f"{how}: {what} ({where})"
        self.outcome.failures[key] = self.outcome.failures.get(key, 0) + 1
        if self.verbose and self.outcome.failures[key] == 1:
            print(f"\n{self.outcome.target}: {key}\n  of {case.told}")
            traceback.print_exception(error)


@contextmanager
def _in_time() -> Iterator[None]:
    """A context manager that raises HangError after SLOW seconds."""
    signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _hang(*_: object) -> None:
    raise HangError(f"the case took more than {SLOW:g} seconds")


def of_the_model(error: BaseException) -> bool:
    """Returns whether the error was raised inside a module's own call."""
    call = nn.Module._call_impl.__code__
    return any(frame.f_code is call for frame, _ in traceback.walk_tb(error.__traceback__))


def _copy(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(a: object, b: object) -> bool:
    """Compares bit for bit; NaN equals NaN."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and (a == b or a is b)
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.is_meta or a.layout != torch.strided or a.is_quantized:
        return True
    dense = [torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for t in (a, b)]
    return torch.equal(*(t.flatten().view(torch.uint8) for t in dense))


def fuzz(target: str, cases: st.SearchStrategy[Case], count: int, seed: int, verbose: bool = False) -> Outcome:
    """Runs `count` cases of a strategy, in chunks; hypothesis may run out of cases earlier."""
    run = Run(target, verbose=verbose)
    for chunk in range(-(-count // CHUNK)):
        wanted, done = min(CHUNK, count - chunk * CHUNK), run.outcome.cases

        @settings(
            max_examples=wanted,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.seed(f"{seed}, {target}, {chunk}")
        @given(cases)
        def some(case: Case) -> None:
            run(case)

        some()
        if run.outcome.cases == done:
            break
    return run.outcome
