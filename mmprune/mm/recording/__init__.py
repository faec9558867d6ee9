"""The record of a run, which training writes, and the page that is made of it."""
