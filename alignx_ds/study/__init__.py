"""The figures of *Axis Collapse*, the AlignX paper, of one finished run: a command and a plot for each.

    alignx-ds study drift RUN_DIR          how fine-tuning changes the features of each axis's prompts
    alignx-ds study forgetting RUN_DIR     what each stage of sequential fine-tuning does to the axes before it
    alignx-ds study contributions RUN_DIR  what each part of the gate contributes, and which expert answers what
    alignx-ds study calibration RUN_DIR    how well calibrated the router and the answers are
    alignx-ds study overlap RUN_DIR        how far the axes' task vectors conflict

Nothing is trained, and the run's own files are not changed: results go into RUN_DIR/study, or --out.

    alignx-ds study scaling-axes RECIPE    every system's worst axis as the axes become more, and one of them rarer

makes its own runs.
"""
