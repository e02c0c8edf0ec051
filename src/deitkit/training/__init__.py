"""One run: a student trained, a teacher fitted, a tape recorded.

It may import distill, models, views, data, settings, config, lengths, rng and terminal.

    jobs.py         train, record or verify a tape: each from its settings to its result
    fit.py          fit a teacher: probe a pretrained network and fine-tune it, or train one from scratch; automatic teachers
    probe.py        pooled features, and the classifier that fits them best
    job.py          what students and fitted teachers share, from settings to summary
    setup.py        settings that the data decide; the student's network; its images
    teaching.py     where its teacher's outputs come from: live, a tape, recorded first
    loop.py         the trainer: steps, evaluation, early stopping; how long to train
    checkpoint.py   what is saved of a training, and when; Ctrl-C and SIGTERM
    epoch_log.py    what an epoch's line of metrics.jsonl is made of
    memory.py       roughly what memory a training will take
    evaluate.py     a network or a teacher on a split: accuracy, calibration, agreement
    tables.py       these figures as tables on the terminal
    predictions.py  predictions.csv; labels that look wrong
    run.py          the run folder: settings, metrics, checkpoints; what a resumed run must have in common
    processes.py    Accelerate's engine, trackers, several processes of this machine
"""
