"""Readers of the layouts that users have; each turns files into the records of `data.schema`."""
