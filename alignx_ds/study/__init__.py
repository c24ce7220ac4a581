"""*Axis Collapse*, looked at: the figures that the AlignX paper draws, of one finished run, a command and a plot each.

    alignx-ds study drift RUN_DIR          what fine-tuning does to the features of each axis's prompts
    alignx-ds study forgetting RUN_DIR     what each stage of sequential fine-tuning takes from the axes before it
    alignx-ds study contributions RUN_DIR  what each part of the gate is worth, and who answers what
    alignx-ds study calibration RUN_DIR    how far the router's and the answers' confidence can be believed

Nothing is trained, and the run's own files are not touched: results go into RUN_DIR/study, or --out.
"""
