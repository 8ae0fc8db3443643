"""A Python that has imported torch and runs a script again and again, each time in a fork of its own.

    {"script": "...", "arguments": [...], "cwd": "...", "env": {...}}    one line in, an object for each run; the
                                                                         script is `train.py` if none is given
    {"code": 2, "out": "...", "err": "..."}                              one line out

A command costs a fraction of a second in it, where the import alone takes seconds.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

from support.trainings import TRAIN


def serve() -> None:
    import torch  # noqa: F401

    import tpresearch.train.loop  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            child = os.fork()
            if child == 0:
                os._exit(_run(asked, out.name, err.name))
            _, status = os.waitpid(child, 0)
            told = {"code": os.waitstatus_to_exitcode(status), "out": out.read(), "err": err.read()}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def _run(asked: dict, out: str, err: str) -> int:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.chdir(asked["cwd"])
    os.environ |= asked["env"]
    script = asked.get("script", str(TRAIN))
    sys.argv = [script, *asked["arguments"]]
    sys.path[0] = str(Path(script).parent)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
