"""How a batch is split over the multiprocessors."""
