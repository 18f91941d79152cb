"""From cuda_src to cubins: NVRTC and the disk cache."""
