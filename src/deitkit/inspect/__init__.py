"""Looking at a finished run: its report with pictures, and what its answers rest on. Imports training and everything below it.

report.py         report.html of one run
side_by_side.py   one page on several runs
explain.py        where the tokens look, which patches the heads need
plots.py          curves, confusion matrix, calibration
charts.py         the style of plots: SVG whose text is text, in colours that all can tell apart
"""
