"""One GPU: its kernels, and how they are launched."""
