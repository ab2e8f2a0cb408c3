"""Grading a student on problems with known answers: asking, reading answers, measures, comparisons."""
