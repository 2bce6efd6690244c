"""The command line, called several times in one process: takes a list of calls as JSON, each its words
and, where they matter, an environment and what is typed; prints a list of exit code, standard output
and standard error.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from irann.__main__ import main


def call(words, environment=(), typed=""):
    os.environ.update(environment)
    sys.stdin, out, err = io.StringIO(typed), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            return end.code or 0, out.getvalue(), err.getvalue()


print(json.dumps([call(*given) for given in json.loads(sys.argv[1])]))
