"""Regular expressions of a foreign adapter_config.json, matched as peft matches them, in bounded time.

Python's `re` can run for years on a few characters and cannot be stopped, so what is more than a name is matched in
a process of its own, with little time and memory.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from ..errors import BridgeError, short

SECONDS = 10.0
MOST = 4096  # characters of a pattern
_PLAIN = re.compile(r"[\w.\-]*", re.ASCII)

_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
except (ImportError, ValueError, OSError):
    pass
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        full, pattern = pattern
        match = re.compile(pattern).fullmatch if full else re.compile(rf"(.*\\.)?({pattern})$").match
        found = [bool(match(name)) for name in names]
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        found = str(error)[:200] or type(error).__name__
    print(json.dumps(found), flush=True)
"""


def matches(patterns: Sequence[tuple[bool, str]], names: Sequence[str], where: str) -> list[list[bool]]:
    """Which names each pattern matches.

    Args:
        patterns: pairs (full, pattern): of the whole name (peft's `target_modules` as one string), or of its end
            behind a dot (keys of `rank_pattern` and `alpha_pattern`).
        names: of modules.
        where: what is being read, for messages.

    Raises:
        BridgeError: no regular expression, or one that is too long or takes too much time or memory.
    """
    for _, pattern in patterns:
        if len(pattern) > MOST:
            raise BridgeError(f"{where}: a pattern of {len(pattern)} characters, expected {MOST} at most")
    odd = [(full, pattern) for full, pattern in patterns if full or not _PLAIN.fullmatch(pattern)]
    answers = iter(_asked(odd, names, where) if odd else ())
    found = []
    for full, pattern in patterns:
        if full or not _PLAIN.fullmatch(pattern):
            found.append(next(answers))
        else:  # a dot is any character, as in peft
            match = re.compile(rf"(.*\.)?({pattern})$").match
            found.append([bool(match(name)) for name in names])
    return found


def _asked(patterns: Sequence[tuple[bool, str]], names: Sequence[str], where: str) -> list[list[bool]]:
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    told = json.dumps([patterns, list(names)])
    try:
        said = subprocess.run(command, input=told, capture_output=True, text=True, timeout=SECONDS, check=False).stdout
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode()
    except OSError as error:
        raise BridgeError(f"{where}: no process to match {short(patterns[0][1])} in ({error.strerror})") from None
    answers = [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith("\n")]
    for (_, pattern), answer in zip(patterns, answers, strict=False):
        if isinstance(answer, str):
            raise BridgeError(f"{where}: {short(pattern)} is no regular expression that peft could use ({answer})")
    if len(answers) < len(patterns):
        raise BridgeError(
            f"{where}: the regular expression {short(patterns[len(answers)][1])} takes more than {SECONDS:g} s or 512 "
            "MB to match; write the names that it means as a list"
        )
    return answers
