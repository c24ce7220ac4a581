"""Generate, judge, measure, report."""
