"""Calls whose arrays have no address yet: traced ones, and those of other frameworks."""
