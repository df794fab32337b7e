r"""Is this answer right? Text first, then exact numbers, then math-verify in a worker process that can be killed.

1. :func:`final_answer` takes the final answer out of the message: the last box, else what follows "answer is", else
   the last formula or number.
2. :func:`settle` decides what text and rational numbers can decide, in microseconds: most answers.
3. A worker (:func:`_in_worker`) decides the rest, if both sides are plain mathematics (:data:`MATHS`). Text outside of
   that grammar equals only itself.

An answer is hostile text: it may keep the parser busy for ever, take all memory, or be code. math-verify's own time-out
needs SIGALRM and so a main thread, which verl's reward workers do not have (verl #3407). Here the kernel kills a worker
that overruns its CPU time (CPU, not wall: a busy machine must not turn right answers into zeros), and a worker that
outgrows its memory ends itself. The answer's status says so, the worker is replaced, and no other answer is lost.

Why the grammar: an answer can make math-verify 0.9.0 with latex2sympy2_extended 1.11.0 run code. Read and tried there:

- ``ExprExtractionConfig`` passes text to sympy's ``parse_expr``, which is ``eval``. Its regex admits only digits, dots,
  spaces, operators and parentheses, so no name gets through; but LaTeX reads the same texts, and it is not used here.
- ``sympy.Number(text)`` is ``eval`` too. The lexer gives it digits, a dot and an exponent, nothing else.
- An accent (``\dot``, ``\mathcal``, ``\text``, ...) makes a symbol whose *name* is any text, and sympy's ``evalf`` of
  an infinite ``\sum`` prints names into Python source and runs that (``lambdify`` in ``sympy.core.evalf.hypsum``).
  ``\boxed{\sum_{n=0}^{\infty}\frac{\dot{(open(...))}^n}{n!}}``, graded against ``\pi``, did open a file for writing.

So no accent, ``\text``, ``\operatorname``, sum, product, integral or limit, and no quote or ``__`` reaches the parser.

What counts as equal, where the libraries leave it open or are too generous:

- Units, ``\$``, ``%`` and ``^\circ`` do not count: 5 cm = 5, 50% = 50 = 0.5. Degrees inside sin, cos, ... do.
- Time of day: 4:30 = 4:30 p.m., but not 4:30 a.m.; 3:30 is not 7:2. A ratio is a quotient: 1:2 = 2:4.
- Numbers are compared exactly; where one is a decimal, to six places and four figures: 1/3 = 0.333333, not 0.33.
  ``1,234`` is a number, ``1, 234`` a list. ``2\frac12`` and ``2 1/2`` are mixed numbers.
- 1011_2 equals 1011_2 and 1011, but neither 1011_3 nor 11: the question fixes the base.
- ``x = 5`` equals 5, but not ``y = 5``; R is not r. An inequality equals its interval. A list has no order, a tuple
  has one.
- Words are compared as text, without regard to case; a choice by its letter: ``\text{(A)}``, "A." and "(A) 7" are A.
"""

import atexit
import contextlib
import functools
import logging
import multiprocessing
import os
import queue
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pebble import ProcessExpired, ProcessPool

Status = Literal["graded", "no_answer", "timeout", "memory", "error"]

MAX_MESSAGE = 100_000  # characters read, from the end, where the final answer is
MAX_ANSWER = 1_000  # a longer final answer equals only itself
CACHED = 8_192  # grades kept
WORKER_MEMORY = 1 << 30  # bytes that one answer may take
OUT_OF_MEMORY = 77  # exit code of a worker that took more
MAX_TASKS = 5_000  # answers per worker, then a fresh one: sympy's and the parser's caches grow
STARTUP = 300.0  # seconds after which a worker that says nothing is given up; starting takes seconds on a busy machine


@dataclass(frozen=True)
class Grade:
    """``correct`` is meaningful for status "graded"; otherwise it is False and ``status`` says why."""

    correct: bool
    status: Status


# --- the final answer -----------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are printed braces, not grouping
_FORMULA = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+)\$|\\\(((?:[^\\]|\\[^()])+)\\\)|\\\[((?:[^\\]|\\[^][])+)\\\]")
_STATED = re.compile(r"(?i)answer\W{0,3}(?:is\b|[:=])[\s:*]*([^\n]+)")
_PLAIN_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` (or `\fbox{...}`), nested braces included; None if absent, unclosed or empty.

    A few MATH solutions write `\boxed 2` without braces: the content then runs to the closing `$` or the line's end.

    >>> last_boxed(r"so $\boxed{1}$, no: $\boxed{\frac{1}{2}}$")
    '\\frac{1}{2}'
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    if text[start : start + 1] != "{":
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip() or None
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return text[start + 1 : match.start()].strip() or None
    return None


def final_answer(message: str) -> str | None:
    """What the message gives as its answer; None if nothing in it looks like one.

    >>> final_answer("We get $x=1$. The answer is $2$."), final_answer("3 apples and 4 pears"), final_answer("Why?")
    ('2', '4', None)
    """
    message = message[-MAX_MESSAGE:]
    if _BOX.search(message):
        return last_boxed(message)
    if stated := [match[1] for match in _STATED.finditer(message)]:
        message = stated[-1].strip(" *.")
    which = 0 if stated else -1  # "the answer is $2$, since $x=1$"
    if formulas := _FORMULA.findall(message):
        return next(filter(None, formulas[which]))
    if stated and len(message.split()) <= 3:
        return message
    numbers = _PLAIN_NUMBER.findall(message)
    return numbers[which] if numbers else None


# --- what text and numbers can decide -------------------------------------------------------------------------------

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ "}
    | {"≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "√": r"\sqrt ", "±": r"\pm "}
)
_FONT = r"\\(?:text[a-z]*|mbox|hbox|math(?:rm|bf|it|sf)|boldsymbol|bm|emph) ?"
_DEGREES = r"(\d+(?:\.\d+)?) ?\^ ?\{? ?\\circ ?\}?"
_TOKEN = r" ?(\d|[A-Za-z]|\\[a-z]+)"
_UNIT_TEXT = rf"(?: ?{_FONT}\{{(?! ?[ap]\.?m\.? ?\}})(?=[^{{}}]*[a-z])[^{{}}]*\}}(?:\^\{{?\d\}}?)?)+"
_UNIT = (
    r"(?:(?:square|sq\.?|cubic|cu\.?) )?(?:[ckm]m|kg|mph|ft|feet|foot|inche?|mile|yard|(?:centi|kilo)?met(?:er|re)|"
    r"pound|gallon|liter|degree|dollar|cent|second|minute|hour|day|week|month|year|unit|percent)s?(?:\^\{?[23]\}?)?"
)
_REWRITES: list[tuple[re.Pattern[str], Any]] = [  # in this order; "(\\\\)|" steps over the ends of a matrix's rows
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\s+", " "),
        (r"(\\\\)|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle)(?:\.(?!\d)|(?![A-Za-z]))", r"\1"),
        (r"(?<=\d) ?(?:\{,\}|, ?\\!|\\,) ?(?=\d{3}(?!\d))", ""),  # 1{,}000, 1,\!000 and 1\,000
        (r"(\\\\)|\\[,;:> ]|~|\\q?quad(?![A-Za-z])", r"\1 "),
        (r" +", " "),
        (r"(\\\\)|\\!|\\phantom ?(?:\{[^{}]*\}|.)", r"\1"),
        (r"(\\\\)|\\?\$|\\[()\[\]]", r"\1"),
        (r"(?<![.,;: \\])(?:[.,;: ]|\\\\)+$", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(le|ge|ne)(?:q|qslant)?(?![A-Za-z])", r"\\\1 "),
        (r"\\(begin|end) ?\{(?:array|[bB]?matrix)\}(?: ?\{[clr|]*\})?", r"\\\1{pmatrix}"),
        (r" ?\\\\ ?(?=\\end)", " "),
        (rf"(\\(?:sin|cos|tan|sec|csc|cot)) ?(?:{_DEGREES}|\( ?{_DEGREES} ?\))", r"\1(\\frac{\2\3\\pi}{180})"),
        (r"\^ ?\{? ?\\(?:circ|degree) ?\}?|\\degree(?![A-Za-z])", ""),
        (r"\\%", "%"),
        (rf",? ?{_FONT}\{{ ?,? ?(?:and|or) ?\}}|,? (?:and|or) ", ", "),
        (r"(?<=[^\s_^{])" + _UNIT_TEXT + "$", ""),
        (_FONT + r"\{([^{}]*)\}", r"\1"),
        (_FONT + r"\{([^{}]*)\}", r"\1"),
        (r"(?i)(?:(?<=:\d\d)|(?<=\d)(?=[ap]\.)| ) ?([ap])\.?m\.? ?$", lambda m: f" {m[1].lower()}m"),
        (r"(?<=[\d)}\]%]) ?" + _UNIT + "$", ""),
        (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\A-Za-z])inf(?:ty|inity)?(?![A-Za-z])", r"\\infty"),
        (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\(frac|sqrt)" + _TOKEN, r"\\\1{\2}"),
        (r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\})" + _TOKEN, r"\1{\2}"),
        (r"(?<![\d/.^_])(\d+) (\d+) ?/ ?(\d+)", r"\1\\frac{\2}{\3}"),
        (r" ?: ?", ":"),
        (r"^ ?(?:\\approx|=) ?", ""),
        (r"(?<![.,;: ])[.,;: ]+$", ""),
    ]
]


def clean(answer: str) -> str:
    r"""One way of writing for many: no spacing commands, sizes, fonts, trailing units or full stop.

    >>> clean(r"$\left(1,\!000,\ \dfrac12\right)$."), clean(r"8\sqrt3\text{ square inches}")
    ('(1000, \\frac{1}{2})', '8\\sqrt{3}')
    """
    text = answer.translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def _key(text: str) -> str:
    """Equal for texts that TeX reads alike: spaces, braces around one token and % signs do not count."""
    return re.sub(r"\{ (\S+) \}", r"\1", " ".join(re.findall(r"\\[A-Za-z]+|\\.|[^\s%]", text)))


_NAMED = re.compile(r"[A-Za-z]\w? ?(?:=|\\in(?![a-z]))(?!.*(?:[=<>]|\\[lg]e )) ?(.+)")
_RELATION = re.compile(r"[=<>]|\\(?:[lg]e|in) ")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_CHOSEN = re.compile(r"\(?([A-Za-z])(?:\)?|\)? ?[).:].*)")
_WORDS = re.compile(r"(?=.*(?:[A-Za-z]{4}|[A-Z]{3}|[A-Z][a-z]{2}))[\w ,.&'-]+")
_BASED = re.compile(r"(-?(?=[0-9A-F.]*[0-9])[0-9A-F.]+)(?:_\{?(\d+)\}?)?")
_CLOCK = re.compile(r"(\d{1,2}(?::\d\d)*)(?: ([ap]m))?")
_DECIMAL = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+|\d+/\d+)")
_MIXED = re.compile(r"([-+]?)(\d*)\\frac\{(-?\d+)\}\{(\d+)\}")
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\overline\{(\d+)\}")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?%?")


def _number(text: str) -> Fraction | None:
    r"""The value of an integer, decimal, fraction or mixed number.

    >>> [str(_number(t)) for t in ("-1.50", r"2\frac{1}{2}", "3/4", r"0.1\overline{6}", "x", "1/0")]
    ['-3/2', '5/2', '3/4', '1/6', 'None', 'None']
    """
    text = text.replace(" ", "")
    try:
        if _DECIMAL.fullmatch(text):
            return Fraction(text)
        if m := _MIXED.fullmatch(text):
            return (-1 if m[1] == "-" else 1) * (int(m[2] or 0) + Fraction(int(m[3]), int(m[4])))
        if m := _REPEATING.fullmatch(text):
            repeats = Fraction(int(m[4]), 10 ** len(m[4]) - 1) / 10 ** len(m[3])
            return (-1 if m[1] == "-" else 1) * (Fraction(f"0{m[2]}.{m[3]}0") + repeats)
    except ZeroDivisionError:
        pass
    return None


def _same_number(answer: str, truth: str) -> bool | None:
    """None if one of the two is no number."""
    a, t = _number(answer.rstrip("%")), _number(truth.rstrip("%"))
    if a is None or t is None:
        return None
    if a != t and answer.endswith("%") != truth.endswith("%"):
        a, t = (a / 100, t) if answer.endswith("%") else (a, t / 100)
    return a == t or ("." in answer + truth and round(a, 6) == round(t, 6) and abs(a - t) <= abs(t) / 10_000)


def settle(answer: str, truth: str) -> bool | tuple[str, str]:
    r"""Equal, not equal, or the two texts that mathematics has to compare. The module's docstring has the rules.

    >>> settle("x = 0.50", r"\frac12"), settle(r"\text{(B)}", "A"), settle(r"\frac{\pi}{2}", r"90^\circ")
    (True, False, ('\\frac{\\pi}{2}', '90'))
    """
    a, t = clean(answer), clean(truth)
    if not a or not t:
        return False
    if _key(a) == _key(t):
        return True
    if choice := _CHOICE.fullmatch(t):
        chosen = _CHOSEN.fullmatch(a)
        return chosen is not None and chosen[1].upper() == choice[1]
    if _WORDS.fullmatch(t):
        return re.sub(r"\W", "", a).casefold() == re.sub(r"\W", "", t).casefold()
    if (name := _NAMED.fullmatch(a)) and not _RELATION.search(t):
        a = name[1]
    elif (name := _NAMED.fullmatch(t)) and not _RELATION.search(a):
        t = name[1]
    a_clock, t_clock = _CLOCK.fullmatch(a), _CLOCK.fullmatch(t)
    if t_clock and ":" in t and not a_clock:
        return False
    if a_clock and t_clock:
        same = [int(n) for n in a_clock[1].split(":")] == [int(n) for n in t_clock[1].split(":")]
        return same and len({a_clock[2], t_clock[2], None}) <= 2  # the same half of the day, or unsaid
    a_based, t_based = _BASED.fullmatch(a), _BASED.fullmatch(t)
    if a_based and t_based and (a_based[2] or t_based[2]):
        return a_based[1] == t_based[1] and len({a_based[2], t_based[2], None}) <= 2
    a, t = (x.replace(",", "") if _THOUSANDS.fullmatch(x) else x for x in (a, t))
    equal = _same_number(a, t)
    if equal is None and _key(a) != _key(t):
        return a.replace("%", ""), t.replace("%", "")
    return equal is not False


# --- mathematics, in a worker ---------------------------------------------------------------------------------------

_COMMANDS = (
    "frac sqrt binom pi infty cup cap setminus emptyset pm mp times cdot div le ge ne lt gt in approx triangle lvert "
    "rvert vert lfloor rfloor lceil rceil sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp alpha "
    "beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega Gamma "
    "Delta Theta Lambda Sigma Phi Psi Omega"
)
MATHS = re.compile(  # all that math-verify gets to see: no name is longer than a letter and its subscript
    r"(?:[0-9A-Za-z +\-*/=<>^()\[\]{},;:.!&|]|_(?:[0-9A-Za-z]|\{[0-9A-Za-z]+\})|\\[\\{}|]|\\mathbb\{[NZQRC]\}"
    rf"|\\(?:begin|end)\{{[pv]matrix\}}|\\(?:{'|'.join(_COMMANDS.split())})(?![A-Za-z]))*"
)


def _start_worker(memory: int) -> None:
    """Runs first in a worker: its limits, and one text of each kind, as the parser is slow with the first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for a product of huge integers to end
    resource.setrlimit(resource.RLIMIT_AS, (_memory(0) + 4 * memory,) * 2)  # should the watch come too late
    logging.disable(logging.WARNING)  # math-verify warns that its time-outs are off
    for text in (r"(-\infty,-2]\cup[1,\frac{x^2}{3})", r"1+\sqrt{2},-\pi", "y=2x", r"\begin{pmatrix}1\\2\end{pmatrix}"):
        _parse(text)
    threading.Thread(target=_watch_memory, args=[_memory(1) + memory], daemon=True).start()


def _memory(field: int) -> int:
    """Bytes of this process: address space (0) or resident (1)."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def _watch_memory(limit: int) -> None:
    """Ends the process above the limit, which may come long before a MemoryError."""
    while _memory(1) <= limit:
        time.sleep(0.05)
    os._exit(OUT_OF_MEMORY)


def _watch_errors(frame, event, argument):
    """Trace function that ends the process at a MemoryError: math-verify would catch it and say "wrong"."""
    if event == "exception" and issubclass(argument[0], MemoryError):
        os._exit(OUT_OF_MEMORY)
    frame.f_trace_lines = False
    return _watch_errors


@functools.lru_cache(maxsize=1_000)  # a truth has many answers
def _parse(text: str):
    """sympy's form of a text in :data:`MATHS`; None if it makes no sense.

    The parser behind ``math_verify.parse``, without its search for formulas in prose and with R other than r.
    """
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
    from math_verify.grader import should_treat_as_complex

    rewrites = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    reading = ConversionConfig(lowercase_symbols=False)
    try:
        return latex2sympy(text, None, not should_treat_as_complex(text), False, rewrites, reading)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # of all kinds
        return None


def _compare(answer: str, truth: str, cpu_seconds: float) -> Grade:
    """Runs in a worker. The kernel kills it after ``cpu_seconds``, also if the process that asked is gone by then."""
    from math_verify import verify

    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal ends a process that does not handle it
    try:
        gold, found = _parse(truth), _parse(answer)
        if gold is None or found is None:
            return Grade(False, "graded")
        sys.settrace(_watch_errors)
        same = verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
        return Grade(same and _really_equal(gold, found), "graded")
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception:  # a bug in one of the libraries
        return Grade(False, "error")
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _really_equal(gold, found) -> bool:
    """A second look at what math-verify calls equal.

    It compares numbers by absolute difference (0.0 equals 1/2004!, 1/2^98 equals 1/2^97) and equations by their real
    solutions (x^2 = -1 equals x^2 = -4).
    """
    import sympy

    try:
        if isinstance(gold, sympy.Eq) and isinstance(found, sympy.Eq):
            ratio = sympy.simplify((gold.lhs - gold.rhs) / (found.lhs - found.rhs))
            return ratio == 1 or bool(gold.free_symbols and ratio.is_number and ratio.is_finite and ratio)
        if gold.free_symbols or found.free_symbols or gold.is_zero:
            return True
        gold, found = gold.evalf(20), found.evalf(20)
        return bool(abs(gold - found) <= abs(gold) / 10_000)
    except (AttributeError, TypeError):  # sets, infinities: nothing to subtract
        return True


_EXITS: dict[int, Status] = {
    -signal.SIGPROF: "timeout",
    OUT_OF_MEMORY: "memory",
    -signal.SIGABRT: "memory",  # GMP, where installed, aborts when it gets none
    -signal.SIGKILL: "memory",  # the kernel's OOM killer
}
_idle: queue.LifoQueue[ProcessPool] = queue.LifoQueue()  # pools of one worker: the end of one disturbs no other
_provided = 0
_providing = threading.Lock()


def _new_worker() -> ProcessPool:
    # spawn: the callers are Ray actors full of threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    return ProcessPool(1, MAX_TASKS, _start_worker, [WORKER_MEMORY], context)


def _provide_workers(number: int) -> None:
    """At least so many from now on. A process starts with its first answer."""
    global _provided
    with _providing:
        while _provided < number:
            _idle.put(_new_worker())
            _provided += 1


def _stop(worker: ProcessPool) -> None:
    worker.stop()
    worker.join()


@atexit.register
def _stop_workers() -> None:
    while not _idle.empty():
        _stop(_idle.get())


def _in_worker(answer: str, truth: str, timeout: float) -> Grade:
    """Wait for an idle worker and its verdict. Waiting is not counted: the clock starts when the work does."""
    _provide_workers(1)
    worker = _idle.get()
    wall = 6 * timeout  # for one that neither works nor ends
    try:
        for _ in range(3):
            with contextlib.suppress(RuntimeError):  # pebble gives up a pool whose idle worker somebody killed
                future = worker.schedule(_compare, args=[answer, truth, timeout], timeout=wall)
                try:
                    return future.result(wall + STARTUP)
                except ProcessExpired as expired:
                    return Grade(False, _EXITS.get(expired.exitcode, "error"))
                except FutureTimeout:
                    if future.done():
                        return Grade(False, "timeout")
            _stop(worker)
            worker = _new_worker()
        return Grade(False, "error")
    finally:
        _idle.put(worker)


@functools.lru_cache(maxsize=CACHED)
def _known(answer: str, truth: str) -> list[Grade]:
    """A place for the grade. It stays empty for a failure, which may be the machine's fault."""
    return []


def grade(response: str, truth: str, timeout: float = 5.0) -> Grade:
    """Grade the final answer in ``response`` against ``truth`` (LaTeX or plain). Blocks; call from a thread.

    Args:
        response: the whole message; the last ``\\boxed{}`` in it counts.
        truth: the ground truth, without a box. It may be hostile too: another answer of the model.
        timeout: CPU seconds until the worker is killed (on the clock: six times that). Starting a worker and waiting
            for one are not counted.

    Returns:
        A :class:`Grade`; never raises for what the texts contain.
    """
    answer = final_answer(response)
    if answer is None:
        return Grade(False, "no_answer")
    if max(len(answer), len(truth)) > MAX_ANSWER:
        return Grade(answer.strip() == truth.strip(), "graded")
    known = _known(answer, truth)
    if not known:
        verdict = settle(answer, truth)
        if isinstance(verdict, bool):
            result = Grade(verdict, "graded")
        elif all(MATHS.fullmatch(text) for text in verdict):
            result = _in_worker(*verdict, timeout)
        else:
            result = Grade(False, "graded")
        if result.status != "graded":
            return result
        known.append(result)
    return known[0]


def grade_batch(pairs: Iterable[tuple[str, str]], timeout: float = 5.0, workers: int = 1) -> list[Grade]:
    """:func:`grade` for many (response, truth), in their order, on at least ``workers`` worker processes."""
    _provide_workers(workers)
    with ThreadPoolExecutor(workers + 1) as threads:
        return list(threads.map(lambda pair: grade(pair[0], pair[1], timeout), pairs))
