"""Output-space terms: distances between the next-token distributions of student and teacher, on vocabulary-parallel heads."""
