"""Looking at a finished run: its report with pictures, and what its answers rest on. Imports training and everything below it.

report.py    report.html of one run, or of several side by side
charts.py    plots as SVG whose text is text, in colours that all can tell apart
"""
