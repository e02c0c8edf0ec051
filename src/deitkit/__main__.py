"""`python -m deitkit` is the command `deit`."""

import runpy

runpy.run_module("deitkit.cli", run_name="__main__", alter_sys=True)
