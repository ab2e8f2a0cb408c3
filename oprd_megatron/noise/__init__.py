"""The noise floor: how far fp8 moves the teacher's states, and whether that matters beside the student's distance."""
