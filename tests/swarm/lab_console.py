"""Python on another host: each line of standard input, JSON, is an expression or a statement; its value, or what it raised, is the answer.

`lab_console.py DATA`; `connect(url)` is `tether.connect` with this data folder, `data` the folder; what is assigned stays.
"""

import functools
import json
import sys

import numpy as np

import tether
from tether.errors import TetherError


def answer(line, names):
    try:
        try:
            code = compile(line, "<console>", "eval")
        except SyntaxError:
            exec(line, names)  # noqa: S102 (what it is for)
            return {"ok": None}
        return {"ok": eval(code, names)}  # noqa: S307 (as above)
    except TetherError as error:
        return {"error": type(error).__name__, "message": str(error)}


def main():
    names = {"data": sys.argv[1], "connect": functools.partial(tether.connect, data=sys.argv[1]), "np": np, "tether": tether}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), names), default=str), flush=True)


if __name__ == "__main__":
    main()
