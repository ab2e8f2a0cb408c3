"""Output-space quantities on vocabulary-parallel heads. (Training objectives in output space are not here yet.)"""
