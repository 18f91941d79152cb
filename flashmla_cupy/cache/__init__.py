"""The paged cache of growing sequences."""
