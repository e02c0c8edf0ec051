"""The verbs of `deit`, a module for each thing that they are about: nothing but wiring.

A verb is a function (argv, prog, help) -> exit code. What needs torch is imported when a verb has read its flags, so that
`--help` is quick.
"""
