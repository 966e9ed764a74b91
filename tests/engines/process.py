"""Engines run in processes of their own: one that hangs, or dies by SIGBUS, fails one test and no more.

`Engine` starts `python -m MODULE` and calls its functions by name: a line of JSON there, a line of JSON back. The
module ends with `answer(FUNCTIONS)`. A process is used for many calls, because importing torch or vLLM takes far
longer than a load.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
_FOREIGN = ("AWS_", "GOOGLE_", "FUSECACHE_", "FSSPEC_", "HF_", "TRANSFORMERS_", "VLLM_", "RUNAI_", "PYTEST_")
_KEEP = {"FUSECACHE_TEST_RUN"}


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of an engine: nobody's settings, no network, caches below `home`."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN) or name in _KEEP
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"}
    caches = {
        "HF_HOME": str(home / "hf"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept | offline | caches | more


class EngineError(Exception):
    """The error that a call raised: `kind` is the name of the exception's type, `text` its message."""

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(f"{kind}: {text}\n{trace}")
        self.kind = kind
        self.text = text


class Engine:
    """Calls functions of a module in another process; starts it with the first call, and after it died."""

    def __init__(self, module: str, log: Path, env: Mapping[str, str]) -> None:
        self._module = module
        self._log = log
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, name: str, /, *, deadline: float = 60.0, **arguments: Any) -> Any:
        """The result of the function; raises EngineError for what it raised, AssertionError if it hangs or dies."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        line = json.dumps({"name": name, "arguments": arguments}) + "\n"
        process.stdin.write(line.encode())
        process.stdin.flush()
        reply = _line(process.stdout, time.monotonic() + deadline)
        if reply is None:
            hung = process.poll() is None
            self.close()
            how = f"hangs: no answer within {deadline} s" if hung else f"died with {process.returncode}"
            raise AssertionError(f"{self._module}.{name} {how}\n{self.output()[-4000:]}")
        answer = json.loads(reply)
        if "error" in answer:
            raise EngineError(**answer["error"])
        return answer["result"]

    def output(self) -> str:
        """The text that the process wrote to stdout and stderr so far."""
        return self._log.read_text("utf-8", "replace") if self._log.exists() else ""

    def close(self) -> None:
        """End the process and its children."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            with open(self._log, "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self._module],
                    cwd=ROOT,
                    env=self._env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
        return self._process


def _line(pipe: IO[bytes], until: float) -> bytes | None:
    """One line; None when there is no more, or not in time."""
    found = b""
    while not found.endswith(b"\n"):
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            return None
        part = os.read(pipe.fileno(), 1 << 16)
        if not part:
            return None
        found += part
    return found


def answer(functions: Mapping[str, Callable[..., Any]]) -> None:
    """The other end: calls what it is told, until its stdin ends. The output of libraries goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            reply = {"result": functions[call["name"]](**call["arguments"])}
        except BaseException as error:
            trace = traceback.format_exc()
            reply = {"error": {"kind": type(error).__name__, "text": str(error), "trace": trace}}
        print(json.dumps(reply), file=replies, flush=True)
