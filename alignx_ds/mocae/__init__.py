"""The Mixture of Calibrated Experts: gate, calibrators, experts, output calibration and model surgery.

Nothing in here knows about files, ranks' ids or the command line.
"""
