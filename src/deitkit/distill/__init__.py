"""The method: a frozen convolutional teacher is distilled into a vision transformer (DeiT, arXiv 2012.12877).

A reader starts at `step.train_step`. It may import models, views, data, settings, config, lengths, rng and terminal.

    step.py      the training step: view -> mix -> student -> both loss terms with their weights -> update
    losses.py    label losses and distillation losses (equations 2 and 3)
    teacher.py   a frozen network, or a function, as a source of logits
    encoding.py  the bytes of a record: a teacher's output, features in 256 of them
    tape.py      cached teacher outputs: the files of a tape, its manifest, where a record lies
    record.py    writing a tape, and verifying one
    optim.py     AdamW, Muon, LAMB; learning rate; EMA

The paper's symbols and their names in the code:

    Z_s, Z_t    logits of student and teacher              `logits_BK`, `teacher_BK`, `TeacherOutput.logits_BK`
    y           true label (mixed: lam, partner's label)   `Batch.labels_B`, `lam_B`, `partner_labels_B`
    y_t         the teacher's hard label, argmax of Z_t    `TeacherOutput.labels_B`
    psi         softmax                                    inside `losses`
    tau         temperature                                `loss.temperature`
    lambda      weight of the distillation term, eq. 2     `loss.teacher_weight`; 1 - lambda is `label_weight`, free of it here
    L_global    equation 2, soft distillation              the sum in `step.train_step`, its teacher's term `losses.soft`
    L_global^   equation 3, hard-label distillation        the same sum with `losses.hard`, weights 1/2 and 1/2
    -           class token, distillation token            `vit.ViT.cls_token`, `vit.ViT.dist_token`
    -           heads on the two tokens (section 4)        `Heads.cls_BK`, `Heads.dist_BK`
    -           classification with both heads (4)       `models.predict.fuse`, "fused"
"""
