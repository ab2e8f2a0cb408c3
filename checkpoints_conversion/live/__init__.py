"""Weights of live, sharded models (torch): in, out, in buckets, and as a Hugging Face directory."""
