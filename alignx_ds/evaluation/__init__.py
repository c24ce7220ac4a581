"""Evaluation: answers, likelihoods, judges, and the report."""
