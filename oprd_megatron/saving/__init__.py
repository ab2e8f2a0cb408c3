"""When and how a student is saved: checkpoints, which of them are kept, and Hugging Face directories."""
