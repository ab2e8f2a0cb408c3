"""vLLM as the rollout engine: its processes, what is asked of them over HTTP, and the student's weights into them."""
