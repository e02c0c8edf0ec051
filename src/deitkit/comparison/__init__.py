"""`deit compare`: the same student with and without a teacher, or any list of contenders, paired by seed.

`plan` says who is compared, `contenders` holds each against the data, `begun` looks at what is there, `tapes` and `budget`
prepare, `work` trains; `results` gathers the figures, `intervals` and `verdicts` say what they mean, `report`, `plots` and `page`
show them.
"""
