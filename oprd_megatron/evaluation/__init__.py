"""Measuring a student against its teacher on held-out prompts, and showing what was measured."""
