"""The formats of a KV cache: what the bytes of a token mean; how they are written and read."""
