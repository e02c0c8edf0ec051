"""Comparisons: many runs, paired by seed, with intervals and a report.

May import every package but `verbs` and `cli`; inside, plan <- results <- report <- runner.
"""
