"""The benchmark: what `flashmla-cupy bench` times, and how."""
