"""The verbs of `deit`: what each reads from its command line, calls and prints. Nothing is computed here.

A verb is a function of a `Call` that returns the exit code. What needs torch is imported once a verb has read its flags, so that
`--help` is quick.

    prepare.py   networks, recipes, data, teachers, tapes
    runs.py      demo, train, compare, evaluate
    use.py       report, explain, predict, export, serve
    common.py    arguments and ways to print that they share
"""
