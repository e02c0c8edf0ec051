"""Comparisons: many runs, paired by seed, with intervals and a report.

It may import every package but the command line and the Python API.

    plan.py     who is compared with whom: contenders, what they share, seeds; each held against the data
    runner.py   carries a plan out: tapes, runs, the minutes of a budget
    results.py  figures gathered from run folders; paired differences and their intervals
    demo.py     `deit demo`: a teacher, two students, a picture
    report.py   tables, plots, Markdown and the HTML page

(The package is not called `compare`: imported, it would hide the function `dk.compare`.)
"""
