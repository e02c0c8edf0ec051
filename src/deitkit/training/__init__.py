"""One run: a student trained, a teacher fitted, a tape recorded.

It may import distill, models, views, data, settings, config, rng and terminal.

    jobs.py      train, fit a teacher, record or verify a tape: each from its settings to its result
    setup.py     settings that the data decide; the student's network; its images
    teaching.py  where its teacher's outputs come from: live, a tape, recorded first
    loop.py      the trainer: steps, evaluation, checkpoints; how long to train
    evaluate.py  a network or a teacher on a split: accuracy, calibration, agreement
    run.py       the run folder, resuming, the processes of a run
"""
