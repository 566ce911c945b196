"""Run command lines (a JSON list on stdin) in this process, and print what each came to."""

import json
import sys

from typer.testing import CliRunner

from fedknow.cli import app

outcomes = []
for line in json.load(sys.stdin):
    result = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
    traceback = (
        None
        if isinstance(result.exception, SystemExit)
        else repr(result.exception)
    )
    outcomes.append(
        {
            "code": result.exit_code,
            "out": result.stdout,
            "err": result.stderr,
            "traceback": result.exception and traceback,
        }
    )
json.dump(outcomes, sys.stdout)
