"""The Mixture of Calibrated Experts: gate, calibrators, experts, output calibration, and the model around them.

Nothing here reads files or the command line.
"""
