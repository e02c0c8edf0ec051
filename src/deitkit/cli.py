"""The command `deit`: which verb is meant, its exit code, its streams. The verbs themselves are in `verbs`."""

from __future__ import annotations

import os
import signal
import sys

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


def _end_early(number: int, _frame: object) -> None:
    """While modules are imported, where an exception would be a traceback or be lost."""
    os.write(2, b"deit: interrupted\n" if number == signal.SIGINT else b"deit: terminated\n")
    os._exit(128 + number)


if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "deit":  # noqa: PTH119 - pathlib takes a while to import
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _end_early)
    signal.signal(signal.SIGTERM, _end_early)

import contextlib
import ctypes
import errno
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deitkit import __version__
from deitkit.terminal import (
    LOST_PEER,
    LOST_WORKER,
    Terminated,
    UserError,
    complain,
    is_lost_peer,
    is_lost_worker,
    is_out_of_memory,
    shortened,
    unknown_name,
)
from deitkit.waiting import end_when_nothing_answers

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class Verb(NamedTuple):
    """A line of `deit --help` and what it does."""

    group: str
    usage: str
    help: str
    function: str
    """where it is in `verbs`, such as `runs.train`"""

    def run(self, argv: list[str], prog: str) -> int:
        module, _, name = self.function.partition(".")
        verbs, flags = importlib.import_module(f"deitkit.verbs.{module}"), importlib.import_module("deitkit.flags")
        code: int = getattr(verbs, name)(flags.Call(argv, prog, self.help))
        return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run `deit` with these arguments. Returns the exit code: 0, 2 for a mistake of the user, 130 when interrupted, 143 after SIGTERM."""
    _ready_streams()
    if argv is None:
        end_when_nothing_answers()
    whole_program, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    # Threads that wait for each other sleep instead of spinning: where others use the machine too, that is worth a factor.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_freed_memory()
    try:
        if whole_program:
            signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) == _end_early:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        complain(f"error: {' '.join(str(error).split())}")
        return USER_ERROR
    except KeyboardInterrupt as error:
        if whole_program:  # a second Ctrl-C would only tell how the loader's workers are being ended
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        what, code = ("terminated", TERMINATED) if isinstance(error, Terminated) else ("interrupted", INTERRUPTED)
        complain(f"{what}: {error}" if str(error) else what)
        return code
    except (MemoryError, RuntimeError) as error:
        if is_lost_worker(error):
            complain(f"error: {LOST_WORKER}")
            return USER_ERROR
        if is_lost_peer(error):  # which says why
            complain("error: another process of this training has ended")
            return LOST_PEER
        if not is_out_of_memory(error):
            raise
        return _out_of_memory()
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EBADF):
            where = "" if error.filename is None else f"{shortened(str(error.filename))}: "
            complain(f"error: {where}{error.strerror or error}")
            return USER_ERROR
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more when it ends
        if isinstance(error, BrokenPipeError):  # `deit models | head`; a training has ended by the time it prints
            return 0
        complain(f"error: the results cannot be printed: {error.strerror}")
        return USER_ERROR


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated


def _out_of_memory() -> int:
    complain("error: not enough memory: give a smaller --batch-size, --image-size or network")
    return USER_ERROR


def _ready_streams() -> None:
    """Streams that take every line: what they cannot spell is escaped, and closed ones swallow it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_freed_memory() -> None:
    """Tell glibc, where that is the C library, to keep large blocks for the next step instead of giving them back to the
    system, which hands them out again page by page: 3 to 10 % of a training on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"deit {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in VERBS:
            try:
                return VERBS[name].run(argv[words:], f"deit {name}")
            except SystemExit as stop:  # `deit VERB --help` has printed its page
                return int(stop.code or 0)
    if argv[0].startswith("-"):
        raise UserError(f"unknown flag {argv[0]}: a verb comes first; deit --help lists them")
    partners = [name for name in VERBS if name.split()[0] == argv[0]]
    if partners and len(argv) == 1:
        raise UserError(f"{argv[0]}: which one? {' or '.join(partners)}")
    if partners and argv[1] in ("-h", "--help"):
        print(overview(partners))
        return 0
    given = argv[:2] if partners else argv[:1]
    raise unknown_name("verb", " ".join(given), partners or VERBS)


def overview(names: Sequence[str] | None = None) -> str:
    """What `deit --help` prints: the verbs by group."""
    chosen = {name: verb for name, verb in VERBS.items() if names is None or name in names}
    width = max(len(f"{name} {verb.usage}") for name, verb in chosen.items())
    lines = [
        "usage: deit VERB ...",
        "",
        "Train small vision transformers from few images, by knowledge distillation.",
        "",
    ]
    group = ""
    for name, verb in chosen.items():
        if verb.group != group:
            group = verb.group
            lines += [f"{group}:"]
        lines.append(f"  {f'{name} {verb.usage}'.ljust(width)}  {verb.help}")
    return "\n".join([*lines, "", "deit VERB --help shows the flags of a verb."])


VERBS: dict[str, Verb] = {
    "demo": Verb("start here", "", "train a teacher, a plain and a distilled student", "runs.demo"),
    "data show": Verb("data", "DATA", "show a data set: counts, sizes, sample views", "prepare.show"),
    "data cache": Verb("data", "DATA", "save resized images for faster loading", "prepare.cache"),
    "models": Verb("networks", "", "list the students: parameters, GMAC, image size", "prepare.models"),
    "teacher fit": Verb("networks", "DATA", "probe, fine-tune or train a convolutional teacher", "prepare.fit"),
    "teacher check": Verb("networks", "TEACHER DATA", "measure a teacher's accuracy", "prepare.check"),
    "tape record": Verb("tapes (cached teacher outputs)", "DATA", "cache a teacher's outputs", "prepare.record"),
    "tape verify": Verb("tapes (cached teacher outputs)", "TAPE DATA", "verify a tape: checksums, data, teacher", "prepare.verify"),
    "tape info": Verb("tapes (cached teacher outputs)", "TAPE", "show what a tape holds", "prepare.info"),
    "recipes": Verb("runs", "[NAME]", "list the shipped recipes, or print one", "prepare.recipes"),
    "train": Verb("runs", "DATA", "train a student, with or without a teacher", "runs.train"),
    "compare": Verb("runs", "DATA", "compare with and without a teacher over seeds", "runs.compare"),
    "evaluate": Verb("runs", "RUN [DATA]", "evaluate a trained model", "runs.evaluate"),
    "report": Verb("runs", "RUN...", "make the page of a run, or of several", "use.report"),
    "predict": Verb("runs", "RUN PATH...", "classify images with a trained model", "use.predict"),
    "explain": Verb("runs", "RUN PATH...", "show which parts of an image count", "use.explain"),
    "serve": Verb("runs", "RUN", "classify images over HTTP, with a web page", "use.serve"),
    "export": Verb("runs", "RUN", "write a network as ONNX, for the web, timm or HF", "use.export"),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
