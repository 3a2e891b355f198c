"""Exported runs: made, timed beside other engines, and shown on a page."""
