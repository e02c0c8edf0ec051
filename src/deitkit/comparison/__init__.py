"""`deit compare`: the same student with and without a teacher, or any list of contenders, paired by seed.

`plan` says who is compared, `contenders` holds each against the data, `tapes` and `budget` prepare, `work` trains; `intervals`,
`results`, `plots` and `page` say what came out.
"""
